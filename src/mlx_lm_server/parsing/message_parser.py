"""A model's text → content, reasoning and calls of tools, while it arrives.

Invariants:
- however the text is cut into pieces, the joined parts are the same;
- no marker of the reasoning is ever content;
- nothing is dropped: what begins as a call and is none comes back as content, with a warning;
- a call within reasoning that never ends is a call where the answer ends with it, and part of the
  reasoning otherwise.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from mlx_lm_server.parsing.channels import HARMONY, ChannelFormat
from mlx_lm_server.parsing.message import MessageBuilder, MessageDelta
from mlx_lm_server.parsing.reader import (
    Markers,
    Reader,
    Script,
    UnparsableError,
)
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats.format import ToolFormat
from mlx_lm_server.parsing.tool_schemas import ToolSchemas

LETTERS = string.ascii_letters + string.digits
# After so many likely marks that began no call, an answer is one that speaks of them.
MAX_UNLIKELY = 64


@dataclass(frozen=True)
class AnswerFormat:
    """How one answer is to be read. `tools` None: calls are text. `channels` read the whole answer;
    `is_harmony` is the same as those of Harmony. `is_open`: the prompt ends within the reasoning.
    `is_calling`: it ends with the mark that begins calls. `head`: it ends within a message of
    channels that has this head."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    is_harmony: bool = False
    is_open: bool = False
    schemas: ToolSchemas | None = None
    channels: ChannelFormat | None = None
    is_calling: bool = False
    head: str = ""

    @property
    def whole(self) -> ChannelFormat | None:
        return HARMONY if self.is_harmony else self.channels


class MessageParser:
    """Reads one sequence."""

    def __init__(self, answer: AnswerFormat) -> None:
        self._answer = answer
        self._reader = Reader()
        self._schemas = answer.schemas or ToolSchemas(())
        self._new_id = _id_maker(answer.tools)
        self._out = MessageBuilder(self._new_id, self._schemas)
        marks = _marks_of(answer)
        self._markers = Markers(marks) if marks else None
        self._mark = ""  # what began the calls that are being read
        self._num_unlikely = 0
        self._script: Script[None] | None = self._begin(answer.head)

    @property
    def is_reasoning(self) -> bool:
        return self._out.is_reasoning

    @property
    def knows_reasoning(self) -> bool:
        return self._answer.whole is not None or self._answer.reasoning is not None

    @property
    def num_calls(self) -> int:
        """Counts the calls that are complete."""
        return self._out.num_ended_calls

    def push(self, text: str) -> MessageDelta:
        if not text:
            return self._out.take()
        self._reader.text += text
        self._run()
        return self._out.take()

    def flush(self, *, is_cut: bool) -> MessageDelta:
        """The text has ended; `is_cut`: by a limit, so that half a call is no fault."""
        self._reader.is_at_end = True
        self._run(is_cut)
        self._out.flush()
        return self._out.take()

    def _begin(self, head: str) -> Script[None]:
        return self._channels(head) if self._answer.whole is not None else self._message()

    def _run(self, is_cut: bool = False) -> None:
        """Lets the script read; where it fails, the mark that misled it is content, and it begins
        again behind that."""
        while self._script is not None:
            try:
                next(self._script)
                if not self._reader.is_at_end:
                    return
            except StopIteration:
                self._script = None
            except UnparsableError as error:
                self._give_up(error, is_cut and self._out.is_call_open)
                self._script = self._again()

    def _give_up(self, error: UnparsableError, is_fine: bool) -> None:
        warning = f"a tool call could not be parsed and is given as text: {error}"
        if is_fine:
            self._reader.recall_all()
            self._reader.take(len(self._reader.text))
        elif self._answer.whole is not None:
            raw = self._reader.recall_all()
            if self._reader.is_at_end:
                raw += self._reader.take(len(self._reader.text))
            self._out.give_back(raw, warning)
        else:
            self._give_back(warning)

    def _give_back(self, warning: str | None) -> None:
        """What began the calls is text; what was read after it is to be read again."""
        reader, tools = self._reader, self._answer.tools
        reader.unread(reader.recall_all())
        raw = reader.take(len(self._mark))
        others = [s for s in tools.starts if s != self._mark] if tools is not None else []
        text = reader.text.lstrip()
        if inner := next((start for start in others if text.startswith(start)), ""):
            raw += reader.take(len(reader.text) - len(text) + len(inner))
        self._out.give_back(raw, warning)

    def _again(self) -> Script[None]:
        return self._channels() if self._answer.whole is not None else self._parts()

    def _channels(self, head: str = "") -> Script[None]:
        assert self._answer.whole is not None
        yield from self._answer.whole.read(self._reader, self._out, self._schemas, head)

    def _message(self) -> Script[None]:
        tools = self._answer.tools
        if self._answer.is_open:
            yield from self._think()
        if tools is not None and self._answer.is_calling:
            yield from self._calls(tools, tools.starts[0], is_given=True)
        yield from self._bare_calls()
        yield from self._parts()

    def _parts(self) -> Script[None]:
        reader, out, reasoning = self._reader, self._out, self._answer.reasoning
        tools = self._answer.tools
        assert self._markers is not None, "without markers there is nothing to parse"
        while (marker := (yield from reader.pass_until(self._markers, out.content))) is not None:
            if reasoning is not None and marker == reasoning.start:
                yield from self._think()
                yield from self._bare_calls()
            elif tools is None:
                continue
            elif marker in tools.starts:
                yield from self._calls(tools, marker)
            elif marker in tools.dropped:
                yield from self._bare_calls()
            elif marker in tools.likely:
                yield from self._likely_calls(tools, marker)

    def _think(self) -> Script[None]:
        reader, reasoning, tools = self._reader, self._answer.reasoning, self._answer.tools
        assert reasoning is not None
        self._out.begin_reasoning()
        starts = tools.starts if tools is not None else ()
        marks = Markers((reasoning.start, reasoning.end, *starts))
        while (found := (yield from reader.pass_until(marks, self._out.reasoning))) is not None:
            if found == reasoning.end:
                break
            if tools is not None and found in starts:
                yield from self._thought_of_call(tools, found, reasoning.end)
        self._out.end_reasoning()

    def _thought_of_call(self, tools: ToolFormat, marker: str, end: str) -> Script[None]:
        """Holds what looks like a call within the reasoning, up to where it is known whether the
        answer ends with it."""
        reader = self._reader
        reader.remember(marker)
        trial = self._ends_with_calls(tools, marker)
        is_last = False
        recent = marker + reader.text
        while end not in recent:
            try:
                next(trial)
            except StopIteration as stop:
                is_last = stop.value
                break
            if not reader.is_at_end:
                recent, num_unread = recent[-len(end) :], len(reader.text)
                yield
                recent += reader.text[num_unread:]
        reader.unread(reader.recall())
        reader.take(len(marker))
        if is_last:
            self._out.end_reasoning()
            yield from self._calls(tools, marker)
        else:
            self._out.reasoning(marker)

    def _ends_with_calls(self, tools: ToolFormat, marker: str) -> Script[bool]:
        """Tells whether calls follow that can be read, and nothing after them."""
        reader = self._reader
        trial = MessageBuilder(self._new_id, self._schemas)
        try:
            while True:
                yield from tools.read(reader, trial, self._schemas, marker)
                yield from reader.skip_space()
                found = yield from reader.accept(*tools.starts)
                if found is None:
                    return reader.is_exhausted
                marker = found
        except UnparsableError:
            return False

    def _calls(self, tools: ToolFormat, marker: str, *, is_given: bool = False) -> Script[None]:
        """Reads calls after a mark; `is_given`: the mark stands in the prompt."""
        self._mark = "" if is_given else marker
        self._reader.remember(self._mark)
        yield from tools.read(self._reader, self._out, self._schemas, marker)
        self._reader.recall()

    def _likely_calls(self, tools: ToolFormat, marker: str) -> Script[None]:
        reader, num_calls = self._reader, self._out.num_calls
        if self._num_unlikely == MAX_UNLIKELY:
            self._out.content(marker)
            return
        self._mark = marker
        reader.remember(marker)
        try:
            yield from tools.read(reader, self._out, self._schemas, marker)
        except UnparsableError:
            if self._out.num_calls > num_calls:
                raise
            self._num_unlikely += 1
            self._give_back(None)
        else:
            reader.recall()

    def _bare_calls(self) -> Script[None]:
        """Reads calls without a marker, at the start of the answer; anything else there is an
        answer."""
        reader, tools = self._reader, self._answer.tools
        if tools is None or not tools.bare:
            return
        reader.remember("")
        yield from reader.skip_space()
        space = reader.recall()
        beginning = yield from reader.next_of(*tools.bare)
        if beginning is None:
            self._out.content(space)
            return
        self._mark = space + beginning
        reader.remember(space)
        num_calls = self._out.num_calls
        try:
            yield from tools.read(reader, self._out, self._schemas, "")
        except UnparsableError:
            if self._out.num_calls > num_calls:
                raise
            self._give_back(None)
        else:
            reader.recall()


def _marks_of(answer: AnswerFormat) -> tuple[str, ...]:
    marks: list[str] = []
    if answer.reasoning is not None:
        marks += answer.reasoning.marks
    if answer.tools is not None:
        marks += (*answer.tools.starts, *answer.tools.likely, *answer.tools.dropped)
    return tuple(marks)


def _id_maker(tools: ToolFormat | None) -> Callable[[], str]:
    if tools is not None and tools.id_letters:
        return lambda: "".join(secrets.choice(LETTERS) for _ in range(tools.id_letters))
    return lambda: "call_" + secrets.token_hex(12)
