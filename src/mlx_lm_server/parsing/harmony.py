"""gpt-oss's Harmony: an answer is a row of messages, each on a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

Analysis is reasoning; a message `to=functions.name` is a call; all else is content. The tokens that
end the answer never become text, so a message may simply end.
"""

from __future__ import annotations

import re

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Markers, Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import json_arguments

NAME = "harmony"
TOKENS = (
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"),
    *("<|end|>", "<|call|>", "<|return|>"),
)
HEADS = Markers(("<|start|>", "<|channel|>"))
ENDS = Markers(("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"))
RECIPIENT = re.compile(r"to=([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def read(reader: Reader, out: MessageBuilder) -> Script[None]:
    start = yield from reader.pass_until(HEADS, out.content)
    while start is not None:
        reader.remember(start)
        while (place := reader.text.find("<|message|>")) < 0:
            if reader.is_at_end:  # half a head says nothing
                reader.recall()
                reader.take(len(reader.text))
                return
            yield
        head = start + reader.take(place + len("<|message|>"))
        recipient, channel = RECIPIENT.search(head), CHANNEL.search(head)
        if recipient is not None:
            start = yield from _call(reader, out, recipient[1].removeprefix("functions."))
            continue
        reader.recall()
        if channel is not None and channel[1] == "analysis":
            out.begin_reasoning()
            start = yield from reader.pass_until(ENDS, out.reasoning)
            out.end_reasoning()
        else:
            start = yield from reader.pass_until(ENDS, out.content)
        if start not in (None, "<|start|>", "<|channel|>"):
            start = yield from reader.pass_until(HEADS, out.content)


def _call(reader: Reader, out: MessageBuilder, name: str) -> Script[str | None]:
    yield from reader.skip_space()
    if not (yield from reader.next_of("{")):
        raise UnparsableError("arguments are no object")
    out.begin_call(name)
    yield from json_arguments(reader, out)
    reader.recall()
    return (yield from reader.pass_until(HEADS, _nothing))


def _nothing(_text: str) -> None:
    """What stands between two messages has no meaning."""
