"""Answers that are a row of messages, each with a head that says for whom it is.

gpt-oss's Harmony:

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

Analysis is reasoning; a message `to=functions.name` is a call; all else is content. The parts of a
head come in any order, of several channels the last one counts, and the answer may begin within a
head, since the prompt ends with `<|start|>assistant`.

Muse's answers are alike: what is `to=self` is reasoning, and a call is a block of tags.

The tokens that end the answer never become text, so a message may simply end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Markers, Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas
from mlx_lm_server.parsing.tool_formats.json_calls import json_arguments

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
RECIPIENT = re.compile(r"to=([^\s<]+)")
LAST_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)(?!.*<\|channel\|>)", re.DOTALL)
# The answer begins within a head where its first letters are such.
HEAD_AT_START = re.compile(r"\s*(?:to=|<\|channel\|>|<\|message\|>)")
MAX_HEAD_CHARS = 1024
# What heads are made of; the last word of one that is cut may be a part of such a word.
HEAD_WORDS = ("assistant", "analysis", "commentary", "final", "json", "to=")
PART_OF_MARK = re.compile(r"<(?:\|\w*\|?)?")
PART_OF_HEAD = re.compile(
    r"(?:\s|<\|\w+\|>|to=\S*|(?:assistant|analysis|commentary|final|json)(?![^\s<]))*"
)
# Recipients that are nobody's tool.
PEOPLE = frozenset({"assistant", "user", "all"})


@dataclass(frozen=True)
class ChannelFormat:
    """`ends` end a message. Messages to `self_name`, or on the `thinking` channel, are reasoning.
    `calls` reads blocks of calls in a message; without it the message is a call's arguments."""

    name: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...]
    thinking: str = ""
    self_name: str = ""
    calls: ToolFormat | None = None

    def open_head(self, prompt: str) -> str:
        """Returns the head of the message within which a prompt ends; empty where it ends between
        two."""
        begin = prompt.rfind(MESSAGE)
        if begin < 0 or any(end in prompt[begin:] for end in self.ends):
            return ""
        return prompt[max(prompt.rfind(START, 0, begin), 0) : begin + len(MESSAGE)]

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, head: str = ""
    ) -> Script[None]:
        """Reads an answer, which begins within a message where the prompt has its `head`."""
        heads = Markers((START, CHANNEL) if self.thinking else (START, MESSAGE))
        if head:
            reader.remember("")
            found = yield from self._body(reader, out, schemas, head)
            start = yield from self._next(reader, out, heads, found)
        else:
            start = yield from self._beginning(reader)
            if start is None:
                start = yield from reader.pass_until(heads, out.content)
        while start is not None:
            found = yield from self._message(reader, out, schemas, start)
            start = yield from self._next(reader, out, heads, found)

    def _next(
        self, reader: Reader, out: MessageBuilder, heads: Markers, found: str | None
    ) -> Script[str | None]:
        """Returns the mark that begins the next message, after the one that ended the last."""
        if found in self.ends and found not in (START, CHANNEL):
            return (yield from reader.pass_until(heads, out.content))
        return found

    def _beginning(self, reader: Reader) -> Script[str | None]:
        """Returns an empty mark where the answer begins within a head."""
        while not reader.text.strip() and not reader.is_at_end:
            yield
        while not HEAD_AT_START.match(reader.text):
            text = reader.text.lstrip()
            beginnings = ("to=", CHANNEL, MESSAGE)
            if reader.is_at_end or not any(mark.startswith(text) for mark in beginnings):
                return None
            yield
        return ""

    def _message(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, start: str
    ) -> Script[str | None]:
        """Reads a head and a message; returns the mark after it."""
        reader.remember(start)
        if start == MESSAGE:
            return (yield from self._body(reader, out, schemas, start))
        while (place := reader.text.find(MESSAGE)) < 0:
            if reader.is_at_end or len(reader.text) > MAX_HEAD_CHARS:
                return (yield from self._without_message(reader, out, start))
            yield
        known = PART_OF_HEAD.match(reader.text, 0, place).end()  # type: ignore[union-attr]
        if any(reader.text.find(mark, known, place) >= 0 for mark in (START, CHANNEL)):
            return (yield from self._without_message(reader, out, start))
        head = start + reader.take(place + len(MESSAGE))
        return (yield from self._body(reader, out, schemas, head))

    def _without_message(
        self, reader: Reader, out: MessageBuilder, start: str
    ) -> Script[str | None]:
        """Reads a head that is cut, which says nothing, or behind which the mark of the message is
        missing."""
        reader.recall()
        head = start + reader.take(PART_OF_HEAD.match(reader.text).end())  # type: ignore[union-attr]
        rest = reader.text
        is_cut = PART_OF_MARK.fullmatch(rest) or any(word.startswith(rest) for word in HEAD_WORDS)
        if reader.is_at_end and is_cut:
            reader.take(len(rest))
        return (yield from self._text(reader, out, self._is_thought(head)))

    def _body(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, head: str
    ) -> Script[str | None]:
        if self.calls is not None:
            reader.recall()
            return (yield from self._parts(reader, out, schemas, head))
        name = self._tool_of(head, schemas)
        if name is not None:
            return (yield from self._call(reader, out, name))
        reader.recall()
        return (yield from self._text(reader, out, self._is_thought(head)))

    def _tool_of(self, head: str, schemas: ToolSchemas) -> str | None:
        recipient = RECIPIENT.search(head)
        if recipient is None or recipient[1] in PEOPLE:
            return None
        return schemas.resolve(recipient[1])

    def _is_thought(self, head: str) -> bool:
        if self.thinking:
            channel = LAST_CHANNEL.search(head)
            return channel is not None and channel[1] == self.thinking
        recipient = RECIPIENT.search(head)
        return recipient is not None and recipient[1] == self.self_name

    def _text(self, reader: Reader, out: MessageBuilder, is_thought: bool) -> Script[str | None]:
        ends = Markers(self.ends)
        if not is_thought:
            return (yield from reader.pass_until(ends, out.content))
        out.begin_reasoning()
        end = yield from reader.pass_until(ends, out.reasoning)
        out.end_reasoning()
        return end

    def _call(self, reader: Reader, out: MessageBuilder, name: str) -> Script[str | None]:
        yield from reader.skip_space()
        if not (yield from reader.next_of("{")):
            raise UnparsableError("arguments are no object")
        out.begin_call(name)
        yield from json_arguments(reader, out)
        reader.recall()
        return (yield from reader.pass_until(Markers((START, CHANNEL)), _nothing))

    def _parts(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, head: str
    ) -> Script[str | None]:
        """Reads a message in which calls are blocks of their own."""
        assert self.calls is not None
        recipient = RECIPIENT.search(head)
        if self._is_thought(head) or (recipient is not None and recipient[1] in PEOPLE):
            return (yield from self._text(reader, out, self._is_thought(head)))
        marks = Markers((*self.calls.starts, *self.ends))
        while (found := (yield from reader.pass_until(marks, out.content))) in self.calls.starts:
            reader.remember(found or "")
            yield from self.calls.read(reader, out, schemas, found or "")
            reader.recall()
        return found


def _nothing(_text: str) -> None:
    """Drops what stands between two messages, which has no meaning."""


HARMONY = ChannelFormat(
    "harmony",
    tokens=(START, CHANNEL, MESSAGE, "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
    ends=("<|end|>", "<|call|>", "<|return|>", START, CHANNEL),
    thinking="analysis",
)
