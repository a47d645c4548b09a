"""A model's text → content, reasoning and calls of tools, while it arrives.

Invariants:
- however the text is cut into pieces, the joined parts are the same;
- no marker of the reasoning is ever content;
- nothing is dropped: what begins as a call and is none comes back as content, with a warning.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from mlx_lm_server.parsing import harmony
from mlx_lm_server.parsing.message import MessageBuilder, MessageDelta
from mlx_lm_server.parsing.reader import (
    Markers,
    Reader,
    Script,
    UnparsableError,
)
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class AnswerFormat:
    """How one answer is to be read. `tools` None: calls are text. `is_open`: the prompt ends within
    the reasoning."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    is_harmony: bool = False
    is_open: bool = False
    schemas: ToolSchemas | None = None


class MessageParser:
    """Of one sequence."""

    def __init__(self, answer: AnswerFormat) -> None:
        self._answer = answer
        self._reader = Reader()
        self._schemas = answer.schemas or ToolSchemas(())
        self._out = MessageBuilder(_id_maker(answer.tools), self._schemas.strict)
        self._markers = Markers(_markers_of(answer)) if _markers_of(answer) else None
        self._script: Script[None] | None = self._begin()

    @property
    def is_reasoning(self) -> bool:
        return self._out.is_reasoning

    @property
    def knows_reasoning(self) -> bool:
        return self._answer.is_harmony or self._answer.reasoning is not None

    @property
    def num_calls(self) -> int:
        """Calls that are complete."""
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

    def _begin(self) -> Script[None]:
        return self._harmony() if self._answer.is_harmony else self._message()

    def _run(self, is_cut: bool = False) -> None:
        """Let the script read; where it fails, what it read is content and it begins again."""
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
        raw = self._reader.recall()
        if self._reader.is_at_end:
            raw += self._reader.take(len(self._reader.text))
        if is_fine:
            return
        self._out.give_back(raw, f"a tool call could not be parsed and is given as text: {error}")

    def _again(self) -> Script[None]:
        return self._harmony() if self._answer.is_harmony else self._parts()

    def _harmony(self) -> Script[None]:
        yield from harmony.read(self._reader, self._out)

    def _message(self) -> Script[None]:
        if self._answer.is_open:
            yield from self._think()
        if self._answer.tools is not None and self._answer.tools.bare:
            yield from self._bare_calls(self._answer.tools)
        yield from self._parts()

    def _parts(self) -> Script[None]:
        reader, out, reasoning = self._reader, self._out, self._answer.reasoning
        assert self._markers is not None, "without markers there is nothing to parse"
        while (marker := (yield from reader.pass_until(self._markers, out.content))) is not None:
            if reasoning is not None and marker == reasoning.start:
                yield from self._think()
                if self._answer.tools is not None and self._answer.tools.bare:
                    yield from self._bare_calls(self._answer.tools)
            elif self._answer.tools is not None and marker in self._answer.tools.starts:
                yield from self._calls(self._answer.tools, marker)

    def _think(self) -> Script[None]:
        reasoning = self._answer.reasoning
        assert reasoning is not None
        self._out.begin_reasoning()
        ends = Markers((reasoning.start, reasoning.end))
        while (yield from self._reader.pass_until(ends, self._out.reasoning)) == reasoning.start:
            pass
        self._out.end_reasoning()

    def _calls(self, tools: ToolFormat, marker: str) -> Script[None]:
        self._reader.remember(marker)
        yield from tools.read(self._reader, self._out, self._schemas)
        self._reader.recall()

    def _bare_calls(self, tools: ToolFormat) -> Script[None]:
        """Calls without a marker, at the start of the answer; anything else there is an answer."""
        reader = self._reader
        reader.remember("")
        yield from reader.skip_space()
        space = reader.recall()
        if (yield from reader.next_of(tools.bare)) is None:
            self._out.content(space)
            return
        reader.remember(space)
        num_calls = self._out.num_calls
        try:
            yield from tools.read(reader, self._out, self._schemas)
        except UnparsableError:
            if self._out.num_calls > num_calls:
                raise
            self._out.give_back(reader.recall(), None)
        reader.recall()


def _markers_of(answer: AnswerFormat) -> tuple[str, ...]:
    markers: list[str] = []
    if answer.reasoning is not None:
        markers += (answer.reasoning.start, answer.reasoning.end, *answer.reasoning.dropped)
    if answer.tools is not None:
        markers += answer.tools.starts
    return tuple(markers)


def _id_maker(tools: ToolFormat | None) -> Callable[[], str]:
    if tools is not None and tools.id_letters:
        return lambda: "".join(secrets.choice(LETTERS) for _ in range(tools.id_letters))
    return lambda: "call_" + secrets.token_hex(12)
