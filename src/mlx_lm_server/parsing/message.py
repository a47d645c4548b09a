"""What a model's text says, piece by piece: content, reasoning and calls of tools.

White space at the border of two parts belongs to the format, not to the parts, and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.tool_schemas import ToolSchemas


@dataclass(slots=True)
class CallDelta:
    """More of call number `index`; `id` and `name` come with its first piece."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class MessageDelta:
    """What became certain since the last one. `warnings` say what could not be parsed and is
    therefore content; `broken_calls` are the numbers of those of them that had already begun."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    broken_calls: list[int] = field(default_factory=list)

    @property
    def broken_call(self) -> int | None:
        """The last of them."""
        return self.broken_calls[-1] if self.broken_calls else None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls or self.warnings)

    def add(self, later: MessageDelta) -> None:
        self.content += later.content
        self.reasoning += later.reasoning
        for call in later.calls:
            self._add_call(call)
        self.warnings += later.warnings
        self.broken_calls += later.broken_calls

    def _add_call(self, call: CallDelta) -> None:
        """Clients take one piece of each call at a time."""
        if self.calls and self.calls[-1].index == call.index:
            self.calls[-1].arguments += call.arguments
        else:
            self.calls.append(call)


class _Part:
    """Text of one kind, without the white space around it."""

    __slots__ = ("_held", "_is_fresh")

    def __init__(self) -> None:
        self._held = ""
        self._is_fresh = False

    def begin(self) -> None:
        """A border: white space before it and after it goes."""
        self._held = ""
        self._is_fresh = True

    def take(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip()
            if not text:
                return ""
            self._is_fresh = False
        text = self._held + text
        sure = text.rstrip()
        self._held = text[len(sure) :]
        return sure

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class MessageBuilder:
    """Where scripts put what they read. One per sequence.

    Only names of the request's tools are calls. Calls of a strict tool are held until they are
    complete and fit its schema.
    """

    def __init__(self, new_id: Callable[[], str], schemas: ToolSchemas) -> None:
        self._new_id = new_id
        self._schemas = schemas
        self._strict = schemas.strict
        self._held_call: CallDelta | None = None
        self._delta = MessageDelta()
        self._content = _Part()
        self._reasoning = _Part()
        self._is_call_open = False
        self.num_calls = 0
        self.num_ended_calls = 0
        self.is_reasoning = False

    def take(self) -> MessageDelta:
        delta, self._delta = self._delta, MessageDelta()
        return delta

    def content(self, text: str) -> None:
        self._delta.content += self._content.take(text)

    def reasoning(self, text: str) -> None:
        self._delta.reasoning += self._reasoning.take(text)

    def begin_reasoning(self) -> None:
        self.is_reasoning = True
        self._content.begin()
        self._reasoning.begin()

    def end_reasoning(self) -> None:
        self.is_reasoning = False
        self._content.begin()

    def check_name(self, name: str) -> None:
        """Raises UnparsableError where the request has no such tool."""
        self._schemas.resolve(name)

    def begin_call(self, name: str, id: str | None = None) -> None:
        """Raises UnparsableError where the request has no such tool."""
        name = self._schemas.resolve(name)
        call = CallDelta(self.num_calls, id or self._new_id(), name)
        if name in self._strict:
            self._held_call = call
        else:
            self._begin(call)

    def _begin(self, call: CallDelta) -> None:
        self._content.begin()
        self._delta.calls.append(call)
        self.num_calls += 1
        self._is_call_open = True

    def arguments(self, text: str) -> None:
        if self._held_call is not None:
            self._held_call.arguments += text
            return
        calls = self._delta.calls
        if not calls or calls[-1].index != self.num_calls - 1:
            calls.append(CallDelta(self.num_calls - 1))
        calls[-1].arguments += text

    def end_call(self) -> None:
        """Raises UnparsableError for a strict call that does not fit."""
        if self._held_call is not None:
            call = self._held_call
            self._strict[call.name or ""].check(_parsed(call.arguments))
            self._held_call = None
            self._begin(call)
        self.num_ended_calls += 1
        self._is_call_open = False

    def call(self, name: str, arguments: str, id: str | None = None) -> None:
        """A call that is known as a whole."""
        self.begin_call(name, id)
        self.arguments(arguments)
        self.end_call()

    def give_back(self, raw: str, warning: str | None) -> None:
        """What began as a call is none: its text is content."""
        self._held_call = None
        if self._is_call_open:
            self._is_call_open = False
            self._delta.broken_calls.append(self.num_calls - 1)
            self._content = _Part()
        if warning is not None:
            self._delta.warnings.append(warning)
        self._delta.content += self._content.take(raw)

    @property
    def is_call_open(self) -> bool:
        return self._is_call_open

    def flush(self) -> None:
        """The text ends here."""
        if not self.is_reasoning:
            self._delta.content += self._content.flush()


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise UnparsableError(str(error)) from error
