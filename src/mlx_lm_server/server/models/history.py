"""Messages of a request → messages as the model's chat template takes them.

Clients send back what they were given, in whatever form their SDK keeps it; templates read what
their authors thought of. Nothing that was said is lost between the two: what a template does not
read in one form, it gets in another that it was seen to read.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, dump, finite, refuse
from mlx_lm_server.server.models.template_traits import ABSENT, Ids, TemplateTraits

Message = dict[str, Any]
LETTERS = string.ascii_letters + string.digits
SHORT_ID_LETTERS = 9
JSON_SPACE = " \t\r\n"
CLOSERS = {"{": "}", "[": "]"}
STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
MAX_NESTING = 100  # far above what calls have, far below what writers of JSON can write
MAX_MENDINGS = 8
# The brackets that are open at a place, innermost first: what closes it, and those around it.
_Brackets: TypeAlias = "tuple[str, _Brackets] | None"


def for_template(
    messages: Iterable[Mapping[str, Any]], traits: TemplateTraits, tools: ToolFormat | None
) -> list[Message]:
    """Returns new messages. Each of those given has a `role`, a `content` that is a text, a list of
    text parts or absent, and `reasoning_content` and `tool_calls` with JSON text as arguments where
    there are any. `tools` is how the model writes calls, for templates that do not."""
    ids = _CallIds(traits)
    found: list[Message] = []
    for message in _with_calls_apart(list(messages), traits):
        one = dict(message)
        if one["role"] == "developer":
            one["role"] = "system"
        if one["role"] == "tool":
            ids.name_result(one)
        if one.get("reasoning_content"):
            one |= dict.fromkeys(traits.reasoning_names, one["reasoning_content"])
        if one.get("tool_calls"):
            found += _with_calls(ids.named(one), traits, tools)
        else:
            one.pop("tool_calls", None)
            found.append(_with_content(one, traits))
    return found


def _with_calls_apart(
    messages: list[Mapping[str, Any]], traits: TemplateTraits
) -> Iterable[Mapping[str, Any]]:
    """Yields each call with its result after it, where a template shows one call of a message
    only."""
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2 or not traits.calls.is_shown or traits.shows_several_calls:
            yield message
            continue
        results = []
        while place < len(messages) and messages[place]["role"] == "tool":
            results.append(messages[place])
            place += 1
        yield from _one_by_one(message, results)


def _one_by_one(
    message: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Iterable[Mapping[str, Any]]:
    """Yields each call with the results of its id, or else with the next one that has none."""
    by_id: dict[str | None, list[Mapping[str, Any]]] = {}
    for result in reversed(results):
        by_id.setdefault(result.get("tool_call_id"), []).append(result)
    for number, call in enumerate(message["tool_calls"]):
        said = message if number == 0 else {"role": message["role"]}
        yield {**said, "tool_calls": [call]}
        if (given := call.get("id")) is not None and given in by_id:
            yield from reversed(by_id.pop(given))
        elif by_id.get(None):
            yield by_id[None].pop()
    left = {id(result) for rest in by_id.values() for result in rest}
    yield from (result for result in results if id(result) in left)


def _with_content(message: Message, traits: TemplateTraits) -> Message:
    """Returns a message with its content in the form in which it appears: a text, or parts."""
    content, role = message.get("content"), message["role"]
    if content is None:
        content = ""
    reasoning = message.get("reasoning_content")
    if reasoning and traits.takes_thinking_parts:
        thought = {"type": "thinking", "thinking": reasoning}
        return {**message, "content": [thought, *_parts(content)]}
    if isinstance(content, list):
        is_taken = len(content) > 0 and traits.takes_parts(role)
        content = content if is_taken else joined(content)
    if content and isinstance(content, str) and traits.needs_parts(role):
        content = _parts(content)
    return {**message, "content": content}


def joined(parts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of parts for a template that takes a text only."""
    return "\n".join(str(part["text"]) for part in parts)


def _parts(content: Any) -> list[Message]:
    if isinstance(content, list):
        return list(content)
    return [{"type": "text", "text": content}] if content else []


def _with_calls(
    message: Message, traits: TemplateTraits, tools: ToolFormat | None
) -> list[Message]:
    way, has_text = traits.calls, bool(message.get("content"))
    if has_text and message.get("reasoning_content") and traits.refuses_thought_beside_text:
        message, has_text = _thinking_aloud(message, traits), False
    if not way.is_shown:
        return [_folded(message, traits, tools)]
    for call in message["tool_calls"]:
        function = call["function"]
        if way.takes_objects:
            function["arguments"] = object_of(function["arguments"])
    if not has_text:
        bare = {k: v for k, v in message.items() if k != "content"}
        if way.content is ABSENT:
            return [bare]
        if message.get("reasoning_content") and traits.takes_thinking_parts:
            return [_with_content({**bare, "content": ""}, traits)]
        return [{**bare, "content": way.content}]
    if traits.shows_calls_beside_text:
        return [_with_content(message, traits)]
    if traits.shows_calls_after_text:
        said = {k: v for k, v in message.items() if k != "tool_calls"}
        calling: Message = {"role": message["role"], "tool_calls": message["tool_calls"]}
        if way.content is not ABSENT:
            calling["content"] = way.content
        return [_with_content(said, traits), calling]
    return [_folded(message, traits, tools)]


def _thinking_aloud(message: Message, traits: TemplateTraits) -> Message:
    """What was said is the end of what was thought."""
    content = message["content"]
    said = joined(content) if isinstance(content, list) else content
    both = f"{message['reasoning_content']}\n\n{said}"
    names = (*traits.reasoning_names, "reasoning_content")
    return {**message, **dict.fromkeys(names, both), "content": ""}


def _folded(message: Message, traits: TemplateTraits, tools: ToolFormat | None) -> Message:
    """Calls as part of the content, in the model's own words, where it is known how it writes
    them."""
    if tools is None or tools.write is None:
        return _with_content({**message, "content": message.get("content") or ""}, traits)
    functions = [call["function"] for call in message["tool_calls"]]
    text = tools.write([(f["name"], object_of(f["arguments"])) for f in functions])
    rest = {k: v for k, v in message.items() if k != "tool_calls"}
    content = message.get("content") or ""
    said = joined(content) if isinstance(content, list) else content
    return _with_content({**rest, "content": f"{said}\n{text}" if said else text}, traits)


class _CallIds:
    """Gives calls the ids that a template takes, and their results the same and the names of what
    was called. One per conversation; a result without an id answers the first call that waits."""

    def __init__(self, traits: TemplateTraits) -> None:
        self._traits = traits
        self._num_calls = 0
        self._given: dict[str, tuple[str, str]] = {}
        self._waiting: list[tuple[str, str]] = []

    def named(self, message: Message) -> Message:
        """Returns a copy of a message with calls, which may be changed further."""
        calls: list[Message] = []
        for call in message["tool_calls"]:
            name = call["function"]["name"]
            id = self._id(call.get("id"), name)
            if call.get("id") is not None:
                self._given[call["id"]] = (id, name)
            self._waiting.append((id, name))
            self._num_calls += 1
            known = {**call, "function": dict(call["function"])}
            if call.get("id") is not None or self._traits.calls.ids is not Ids.ANY:
                known["id"] = id
            calls.append(known)
        return {**message, "tool_calls": calls}

    def name_result(self, message: Message) -> None:
        given = message.get("tool_call_id")
        if given is None and not self._waiting:
            return
        if given is None:
            id, name = self._waiting[0]
        else:
            id, name = self._given.get(given) or (self._taken(given), "")
        self._waiting = [one for one in self._waiting if one[0] != id]
        if given is not None or self._traits.calls.ids is not Ids.ANY:
            message["tool_call_id"] = id
        if name and not message.get("name"):
            message["name"] = name

    def _id(self, given: str | None, name: str) -> str:
        match self._traits.calls.ids:
            case Ids.NAMING:
                return f"functions.{name}:{self._num_calls}"
            case Ids.SHORT:
                return short_id(given or f"{name}:{self._num_calls}")
        return given if given is not None else f"call_{self._num_calls}"

    def _taken(self, given: str) -> str:
        """Returns the id of a result whose call is not in the conversation, as far as a template
        minds."""
        return short_id(given) if self._traits.calls.ids is Ids.SHORT else given


def short_id(id: str) -> str:
    """Returns nine letters and digits: those given, or others that are always the same for an
    id."""
    if len(id) == SHORT_ID_LETTERS and id.isascii() and id.isalnum():
        return id
    number = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")
    letters = ""
    for _ in range(SHORT_ID_LETTERS):
        number, place = divmod(number, len(LETTERS))
        letters += LETTERS[place]
    return letters


def object_of(arguments: str) -> dict[str, Any]:
    """Returns the arguments of a call as an object, whatever a model once wrote: text that a limit
    cut is closed, what is nested deeper than MAX_NESTING is cut there, and what is no object at all
    is an empty one."""
    for text in _readings(arguments):
        try:
            value = json.loads(text, parse_constant=refuse, parse_float=finite, strict=False)
            if not isinstance(value, dict):
                return {}
            if not _is_too_deep(value):
                dump(value)  # half of a character can be read, but not written
                return value
        except (ValueError, RecursionError, UnparsableError):
            continue
    return {}


def _readings(text: str) -> Iterator[str]:
    """Yields the text, and others that are JSON if it was so but for escapes that there are none
    of, and for its end."""
    yield text
    text = _with_valid_escapes(text)
    yield text
    outline = _outline(text)
    if outline is None:
        return
    yield text[: outline.end] + outline.closers
    for place, brackets in reversed(outline.places):  # without the member that was begun last
        yield text[:place].rstrip(JSON_SPACE + ",") + _closers(brackets)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _with_valid_escapes(text: str) -> str:
    parts, place = [], 0
    while (found := text.find("\\", place)) >= 0:
        is_valid = text[found + 1 : found + 2] in set('"\\/bfnrtu')
        parts.append(text[place:found] + ("\\" if is_valid else "\\\\"))
        place = found + 1
        if is_valid:
            parts.append(text[place : place + 1])
            place += 1
    return "".join([*parts, text[place:]])


@dataclass
class _Outline:
    """Where the text's last members begin, each with the brackets that are open there; and up to
    where the text is used, with what closes it."""

    places: Sequence[tuple[int, _Brackets]]
    end: int
    closers: str


def _outline(text: str) -> _Outline | None:
    """Returns None where a bracket is closed wrongly."""
    places: deque[tuple[int, _Brackets]] = deque(maxlen=MAX_MENDINGS)
    open_: _Brackets = None
    depth = 0
    for found in STRUCTURE.finditer(text):
        mark = found[0]
        if mark == '"':  # a string that does not end
            return _Outline(places, len(text), '"' + _closers(open_))
        if mark in CLOSERS:
            if depth == MAX_NESTING:
                places.append((found.start(), open_))
                return _Outline(places, found.start(), _closers(open_))
            open_ = (CLOSERS[mark], open_)
            depth += 1
            places.append((found.end(), open_))
        elif mark == ",":
            places.append((found.start(), open_))
        elif mark in ("}", "]"):
            if open_ is None or open_[0] != mark:
                return None
            open_ = open_[1]
            depth -= 1
    return _Outline(places, len(text), _closers(open_))


def _closers(brackets: _Brackets) -> str:
    found = ""
    while brackets is not None:
        mark, brackets = brackets
        found += mark
    return found
