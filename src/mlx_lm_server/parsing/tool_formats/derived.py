"""A format that is none of a known family, taken from what a template writes for a call."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm_server.parsing.tool_formats.format import ToolFormat
from mlx_lm_server.parsing.tool_formats.json_calls import (
    ARGUMENT_KEYS,
    NAME_KEYS,
    JsonCalls,
)
from mlx_lm_server.parsing.tool_formats.named_calls import NamedCalls
from mlx_lm_server.parsing.tool_formats.tag_calls import Tag, TagCalls

NAME = "template"
MARK_LETTERS = frozenset("<[{|")
LAST_WORD = re.compile(r"(\S+)\s*\Z")
FIRST_MARK = re.compile(r"\s*([<\[|]\S*?(?:>|\]|\|)|\Z)")
TAG = re.compile(r"<[^<>]*>")


def derived_formats(text: str, name: str, arguments: Mapping[str, Any]) -> Iterator[ToolFormat]:
    """Yields formats in which a text may be written that calls `name`; whether one reads it is for
    the caller to try. Of the arguments the first two are texts that occur once."""
    yield from _json_formats(text, name, arguments)
    yield from _named_formats(text, name)
    if text.count(name) == 1:
        yield from _tag_formats(text, name, arguments)


def _json_formats(text: str, name: str, arguments: Mapping[str, Any]) -> Iterator[ToolFormat]:
    for begin, call, end in _objects(text):
        inner = call.get("function") if isinstance(call.get("function"), dict) else call
        assert isinstance(inner, dict)
        if inner.get("name") != name and name not in [inner.get(key) for key in NAME_KEYS]:
            continue
        if dict(arguments) not in [inner.get(key) for key in ARGUMENT_KEYS]:
            continue
        before, after = text[:begin].rstrip(), text[end:]
        is_list = before.endswith("[")
        mark = _mark_before(before.removesuffix("["))
        if mark is None:
            continue
        close = FIRST_MARK.match(after.lstrip().removeprefix("]"))
        ends = (close[1],) if close is not None and close[1] else ()
        yield JsonCalls((mark,), ends, is_list=is_list).format(NAME)


def _named_formats(text: str, name: str) -> Iterator[ToolFormat]:
    place = text.find(name)
    for begin, _, end in _objects(text):
        if not 0 <= place < begin:
            continue
        mark, middle = _mark_before(text[:place]), text[place + len(name) : begin].strip()
        if mark is None or not middle:
            continue
        close = FIRST_MARK.match(text[end:])
        yield NamedCalls(mark, middle, close[1] if close is not None else "").format(NAME)
        return


def _tag_formats(text: str, name: str, arguments: Mapping[str, Any]) -> Iterator[ToolFormat]:
    texts = [(key, value) for key, value in arguments.items() if isinstance(value, str)]
    pieces = _pieces(text, [name, *(word for pair in texts[:2] for word in pair)])
    if len(texts) < 2 or pieces is None:
        return
    before, to_key, to_value, to_next, _, after = pieces
    key_open = _mark_before(to_key)
    call_open = _mark_before(before)
    head = TAG.findall(to_value)
    if key_open is None or call_open is None or not to_value.strip():
        return
    pads = to_value.endswith("\n") and to_next.startswith("\n")
    value_close = to_next.strip().removesuffix(key_open).strip()
    rest = after.strip().removeprefix(value_close)
    closes = TAG.findall(rest)
    if not value_close or not closes:
        return
    separator = to_key.strip().removesuffix(key_open).strip()
    has_head_end = not separator.startswith("<")
    block = _mark_before(before.rstrip().removesuffix(call_open))
    has_block = block is not None and len(closes) > 1
    blocks = ((block or "", closes[1]),) if has_block else ()
    yield TagCalls(
        Tag(call_open, separator if has_head_end else "", closes[0]),
        Tag(key_open, head[0] if len(head) > 1 else to_value.strip(), value_close),
        blocks=blocks,
        value_open=head[1] if len(head) > 1 else "",
        separator="" if has_head_end else separator,
        pads=pads,
        is_block_optional=has_block,
    ).format(NAME)


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yields the JSON objects in a text that are in no other."""
    decoder, place = json.JSONDecoder(), 0
    while (begin := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, begin)
        except ValueError:
            place = begin + 1
            continue
        yield begin, value, end
        place = end


def _pieces(text: str, words: list[str]) -> list[str] | None:
    """Returns what stands before, between and after words that follow each other."""
    found: list[str] = []
    for word in words:
        before, mark, text = text.partition(word)
        if not mark:
            return None
        found.append(before)
    return [*found, text]


def _mark_before(text: str) -> str | None:
    """Returns the mark at the end of a text; None where there is no distinct one."""
    last = LAST_WORD.search(text)
    if last is None:
        return None
    word = last[1]
    begin = word.rfind("<") if "<" in word else word.rfind("[")
    mark = word[begin:] if begin >= 0 else word
    return mark if len(mark) > 2 and not MARK_LETTERS.isdisjoint(mark) else None
