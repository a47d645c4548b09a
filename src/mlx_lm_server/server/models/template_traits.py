"""What a chat template makes of messages, found by trying it with true ones.

A template is asked with conversations whose words occur nowhere else, and judged by where they
appear in what it writes. What it refuses says nothing: then another form is tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Final, Protocol

from mlx_lm_server.server.models.template_names import TemplateNames

Message = dict[str, Any]
Call = tuple[str, Mapping[str, Any]]

QUESTION, WORDS, THOUGHT = "probe question", "probe words", "probe thought"
NAME, KEY, VALUE = "probe_tool", "probe_key", "probe_value"
OTHER_NAME, OTHER_VALUE = "probe_tool_too", "probe_other"
LEFT, RIGHT = "probe left", "probe right"
FOREIGN_ID, SHORT_ID = "call_0f1e2d3c4b5a69788796a5b4", "a1b2c3d4e"
ABSENT: Final = object()
# Fields of a message in which templates look for what an assistant thought.
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_text")
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})
USER: Message = {"role": "user", "content": QUESTION}


class Ids(Enum):
    """What ids of calls a template takes: any, those of nine letters, or those that name the
    function, since nothing else does."""

    ANY = "any"
    SHORT = "short"
    NAMING = "naming"


class Renders(Protocol):
    """A template, as far as it is needed here."""

    @property
    def names(self) -> TemplateNames: ...

    @property
    def source(self) -> str: ...

    def attempt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = NO_FIELDS,
        *,
        add_generation_prompt: bool = False,
    ) -> str | None: ...


@dataclass(frozen=True)
class CallWay:
    """How a template takes calls of tools: their arguments as objects or as JSON text, the content
    of a message that has only calls, and ids. `is_shown`: it writes them at all."""

    takes_objects: bool = True
    content: Any = ""
    ids: Ids = Ids.ANY
    is_shown: bool = False


@dataclass(frozen=True)
class WrittenCalls:
    """What a template writes for calls: texts in which an answer of the model's would be, with
    what comes after it. The first begin where the prompt ends."""

    texts: tuple[str, ...]
    calls: tuple[Call, ...]
    tools: tuple[Mapping[str, Any], ...]


def tool(name: str, arguments: Mapping[str, Any]) -> Message:
    """Returns a complete tool whose arguments are like those given."""
    kinds = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object"}
    properties = {
        key: {"type": kinds[type(value)], "description": "What it is."}
        for key, value in arguments.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": name, "description": "What it does.", "parameters": schema}
    return {"type": "function", "function": function}


# No probe calls this one, so that what is called appears in calls only.
OTHER_TOOL = tool("other_tool", {"city": "x"})


class TemplateTraits:
    """Answers questions about one template, each tried once, when it is first asked."""

    def __init__(self, template: Renders) -> None:
        self._template = template

    def try_out(self) -> None:
        """Answers what the first conversations will ask."""
        for role in ("system", "user", "assistant"):
            self.needs_parts(role)
        if "tool_calls" in self._template.names.attributes:
            _ = self.calls, self.shows_calls_beside_text, self.refuses_thought_beside_text

    @cached_property
    def calls(self) -> CallWay:
        """The first way, of those that are closest to what was sent, in which calls appear."""
        for id, ids in ((FOREIGN_ID, Ids.ANY), (SHORT_ID, Ids.SHORT)):
            is_refused = True
            for takes_objects in (True, False):
                for content in ("", None, ABSENT):
                    way = CallWay(takes_objects, content, ids)
                    text = self._with_calls([(NAME, {KEY: VALUE})], way, id=id)
                    is_refused = is_refused and text is None
                    if text is None or not _shows(text, takes_objects):
                        continue
                    is_named = NAME in text or _numbered(id, 0) not in text
                    is_naming = ids is Ids.ANY and not is_named
                    chosen = Ids.NAMING if is_naming else ids
                    if chosen is Ids.ANY and self._refuses_id("c1", way):
                        chosen = Ids.SHORT
                    return CallWay(takes_objects, content, chosen, is_shown=True)
            if not is_refused:
                break
        return CallWay()

    def _refuses_id(self, id: str, way: CallWay) -> bool:
        return self._with_calls([(NAME, {KEY: VALUE})], way, id=id) is None

    @cached_property
    def shows_several_calls(self) -> bool:
        """Tells whether all calls of one message appear."""
        calls = [(NAME, {KEY: VALUE}), (OTHER_NAME, {KEY: OTHER_VALUE})]
        text = self._with_calls(calls, self.calls)
        return text is not None and VALUE in text and OTHER_VALUE in text

    @cached_property
    def shows_calls_beside_text(self) -> bool:
        """Tells whether calls appear in a message that has content too."""
        way = CallWay(self.calls.takes_objects, WORDS, self.calls.ids)
        text = self._with_calls([(NAME, {KEY: VALUE})], way)
        return text is not None and VALUE in text

    @cached_property
    def shows_calls_after_text(self) -> bool:
        """Tells whether they do in a message of their own, after one that has the content."""
        way = self.calls
        said = {"role": "assistant", "content": WORDS}
        text = self._with_calls([(NAME, {KEY: VALUE})], way, before=[said])
        return text is not None and VALUE in text and WORDS in text

    @cached_property
    def reasoning_names(self) -> tuple[str, ...]:
        """The fields in which it may look for reasoning."""
        attributes = self._template.names.attributes
        return tuple(name for name in REASONING_NAMES if name in attributes)

    @cached_property
    def refuses_thought_beside_text(self) -> bool:
        """Tells whether a message with calls may have what was thought or what was said, but not
        both."""
        call, fields = [(NAME, {KEY: VALUE})], dict.fromkeys(self.reasoning_names, THOUGHT)
        way = CallWay(self.calls.takes_objects, WORDS, self.calls.ids)
        both, one = (self._with_calls(call, way, more=more) for more in (fields, {}))
        return both is None and one is not None

    @cached_property
    def takes_thinking_parts(self) -> bool:
        """Tells whether reasoning is to be a part of the content, since no field of the message
        shows it."""
        if "thinking" not in self._template.source:
            return False
        by_field = {"role": "assistant", "content": WORDS} | dict.fromkeys(REASONING_NAMES, THOUGHT)
        parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": WORDS}]
        fields = self._template.attempt([USER, by_field])
        text = self._template.attempt([USER, {"role": "assistant", "content": parts}])
        is_shown = text is not None and THOUGHT in text and WORDS in text
        return is_shown and not _is_written_down(text or "") and THOUGHT not in (fields or "")

    @lru_cache(maxsize=8)  # noqa: B019 - lives as long as the template
    def takes_parts(self, role: str) -> bool:
        """Tells whether content in parts appears as the text of all parts."""
        parts = [{"type": "text", "text": LEFT}, {"type": "text", "text": RIGHT}]
        text = self._said_by(role, parts)
        if text is None or LEFT not in text or RIGHT not in text:
            return False
        return not _is_written_down(text)

    @lru_cache(maxsize=8)  # noqa: B019
    def needs_parts(self, role: str) -> bool:
        """Tells whether only content in parts appears."""
        text = self._said_by(role, WORDS)
        if text is not None and WORDS in text:
            return False
        part = self._said_by(role, [{"type": "text", "text": WORDS}])
        return part is not None and WORDS in part and not _is_written_down(part)

    def written(self, calls: Sequence[Call]) -> WrittenCalls | None:
        """Returns what it writes for some calls; None where they do not appear."""
        way = self.calls
        tools = tuple(tool(name, arguments) for name, arguments in calls)
        if not way.is_shown:
            return None
        text = self._with_calls(calls, way, tools=tools)
        if text is None:
            return None
        texts = dict.fromkeys(self._answers_in(text, tools))
        return WrittenCalls(tuple(texts), tuple(calls), tools)

    def thought(self) -> tuple[str, str, str] | None:
        """Returns what it writes before and after the reasoning of an answer, if it does, and
        what it writes before an answer without any."""
        message: Message = {"role": "assistant", "content": WORDS}
        message |= dict.fromkeys(REASONING_NAMES, THOUGHT)
        if self.takes_thinking_parts:
            parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": WORDS}]
            message["content"] = parts
        text = self._template.attempt([USER, message])
        if text is not None and THOUGHT in text:
            before, _, after = text.rpartition(THOUGHT)
            plain = self._template.attempt([USER, {"role": "assistant", "content": WORDS}])
            return before, after.partition(WORDS)[0], (plain or "").rpartition(WORDS)[0]
        return None

    def _answers_in(self, text: str, tools: Sequence[Message]) -> Iterator[str]:
        """Yields the part of a conversation that the model would have written, begun where the
        prompt ends, and where a conversation without calls goes on differently."""
        prompt = self._template.attempt([USER], tools, add_generation_prompt=True)
        if prompt is not None and text.startswith(prompt):
            yield text[len(prompt) :]
        plain = self._template.attempt([USER, {"role": "assistant", "content": WORDS}], tools)
        if plain is not None:
            before, _, after = plain.rpartition(WORDS)
            common = _common_start(text, before)
            end = _common_start(text[::-1], after[::-1])
            yield text[len(_without_open_mark(common)) : len(text) - len(end)]
        begin = text.rfind(QUESTION)
        yield text[begin + len(QUESTION) :]

    def _with_calls(
        self,
        calls: Sequence[Call],
        way: CallWay,
        *,
        id: str | None = None,
        before: Sequence[Message] = (),
        more: Mapping[str, Any] = NO_FIELDS,
        tools: Sequence[Message] = (OTHER_TOOL,),
    ) -> str | None:
        """Returns a conversation with calls: the first in which they appear, of those without and
        with results, with and without tools; else any that is not refused."""
        chosen = id or (SHORT_ID if way.ids is Ids.SHORT else FOREIGN_ID)
        asked = [USER, *before, {**_calling(calls, way, chosen), **more}]
        answered = [*asked, *(_result(chosen, i, name) for i, (name, _) in enumerate(calls))]
        first: str | None = None
        for given in (tools, None):
            for messages in (asked, answered):
                text = self._template.attempt(messages, given)
                if text is not None and all(_last(arguments) in text for _, arguments in calls):
                    return text
                first = text if first is None else first
        return first

    def _said_by(self, role: str, content: Any) -> str | None:
        message: Message = {"role": role, "content": content}
        if role == "tool":
            way = self.calls
            id = SHORT_ID if way.ids is Ids.SHORT else FOREIGN_ID
            message |= {"tool_call_id": _numbered(id, 0), "name": NAME}
            return self._template.attempt(
                [USER, _calling([(NAME, {KEY: VALUE})], way, id), message], [OTHER_TOOL]
            )
        before = [USER] if role == "assistant" else []
        after = [USER] if role != "user" else []
        return self._template.attempt([*before, message, *after])


def _calling(calls: Sequence[Call], way: CallWay, id: str) -> Message:
    found = [
        {
            "id": f"functions.{name}:{i}" if way.ids is Ids.NAMING else _numbered(id, i),
            "type": "function",
            "function": {"name": name, "arguments": _arguments(arguments, way)},
        }
        for i, (name, arguments) in enumerate(calls)
    ]
    message: Message = {"role": "assistant", "tool_calls": found}
    return message if way.content is ABSENT else {**message, "content": way.content}


def _arguments(arguments: Mapping[str, Any], way: CallWay) -> Any:
    return dict(arguments) if way.takes_objects else json.dumps(arguments, ensure_ascii=False)


def _result(id: str, number: int, name: str) -> Message:
    return {
        "role": "tool",
        "tool_call_id": _numbered(id, number),
        "name": name,
        "content": "probe result",
    }


def _numbered(id: str, number: int) -> str:
    return f"{id[:-1]}{number}"


def _last(arguments: Mapping[str, Any]) -> str:
    """A text that appears where the arguments do."""
    return next(reversed([v for v in arguments.values() if isinstance(v, str)]), "")


def _is_written_down(text: str) -> bool:
    """Tells whether parts appear as the objects that they are, in Python's words or JSON's."""
    return any(word in text for word in ("'type'", '"type":'))


def _shows(text: str, takes_objects: bool) -> bool:
    """Tells whether a call appears, and not as Python writes an object."""
    return VALUE in text and not (takes_objects and f"'{KEY}'" in text)


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    return one[:place]


def _without_open_mark(text: str) -> str:
    """Returns a text up to a mark that only begins at its end."""
    begin = max(text.rfind("<"), text.rfind("["))
    return text[:begin] if begin > max(text.rfind(">"), text.rfind("]")) else text
