"""Which format a model uses, read off what its chat template writes: a format counts if its reader
reads the template's own calls back as the same calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_lm_server.parsing import reasoning
from mlx_lm_server.parsing.channels import ChannelFormat
from mlx_lm_server.parsing.formats import CHANNEL_FORMATS
from mlx_lm_server.parsing.message_parser import AnswerFormat, MessageParser
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats.derived import derived_formats
from mlx_lm_server.parsing.tool_formats.families import FORMATS
from mlx_lm_server.parsing.tool_formats.format import ToolFormat
from mlx_lm_server.parsing.tool_schemas import ToolSchemas

Calls = Sequence[tuple[str, Mapping[str, Any]]]
# What begins and ends reasoning looks like this.
MARK_AT_END = re.compile(r"(<[^<>\n]{2,60}>|\[[A-Za-z_ ]{3,40}\])\s*\Z")
MARK_AT_START = re.compile(r"\s*(</[^<>\n]{2,60}>|<[^<>\n/]{2,60}>|\[/?[A-Za-z_ ]{3,40}\])")


def channels_of(texts: Iterable[str], calls: Calls, tools: Sequence[Any]) -> ChannelFormat | None:
    """Returns the channels that read some calls in one of the texts."""
    texts = tuple(texts)
    for channels in CHANNEL_FORMATS.values():
        answer = AnswerFormat(channels=channels, schemas=ToolSchemas(tools))
        if any(_reads(answer, text, calls) for text in texts):
            return channels
    return None


def tool_format_of(
    texts: Iterable[str],
    calls: Calls,
    tools: Sequence[Any],
    thinks: ReasoningFormat | None,
    *,
    derives: bool,
) -> ToolFormat | None:
    """Returns the format that reads some calls in one of the texts: one of a known family, else,
    where it `derives`, one that is taken from them."""
    texts, schemas = tuple(texts), ToolSchemas(tools)
    for one in FORMATS:
        for text in texts:
            if _may_be_in(one, text) and _reads(_answer(thinks, one, schemas), text, calls):
                return one
    name, arguments = calls[0]
    for text in texts if derives else ():
        for one in derived_formats(text, name, arguments):
            if _reads(_answer(thinks, one, schemas), text, calls):
                return one
    return None


def _may_be_in(one: ToolFormat, text: str) -> bool:
    return any(start in text for start in (*one.starts, *one.likely, *one.bare))


def _answer(
    thinks: ReasoningFormat | None, tools: ToolFormat, schemas: ToolSchemas
) -> AnswerFormat:
    """What is only likely a call is none for certain."""
    likely = tuple(mark for mark in tools.likely if not mark.startswith("{"))
    return AnswerFormat(thinks, replace(tools, likely=likely), schemas=schemas)


def reasoning_format_of(before: str, after: str, plain: str) -> ReasoningFormat | None:
    """Returns the format whose marks stand before and after some reasoning: a known one, else one
    that is made of them, if the first does not stand before every answer, as in `plain`."""
    for one in reasoning.FORMATS:
        is_around = before.rstrip().endswith(one.start.rstrip()) and after.lstrip().startswith(
            one.end
        )
        if is_around and not one.signs:
            return one
    start, end = MARK_AT_END.search(before), MARK_AT_START.match(after)
    if start is None or end is None or plain.rstrip().endswith(start[1]):
        return None
    return ReasoningFormat("template", start[1], end[1])


def _reads(answer: AnswerFormat, text: str, calls: Calls) -> bool:
    parser = MessageParser(answer)
    found: list[list[str]] = []
    for delta in (parser.push(text), parser.flush(is_cut=False)):
        for call in delta.calls:
            if call.name is not None:
                found.append([call.name, ""])
            found[-1][1] += call.arguments
        if delta.broken_calls:
            return False
    try:
        read = [(name, json.loads(arguments)) for name, arguments in found]
    except ValueError:
        return False
    return read == [(name, dict(arguments)) for name, arguments in calls]
