"""Formats whose arguments are a JSON object."""

from __future__ import annotations

import re

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import (
    ToolFormat,
    ToolSchemas,
    json_arguments,
    json_call,
)


def _hermes(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`"""
    yield from json_call(reader, out)
    yield from reader.skip_space()
    while (yield from reader.next_of("{")):
        yield from json_call(reader, out)
        yield from reader.skip_space()
    if not reader.is_exhausted:
        yield from reader.expect("</tool_call>")


def _llama(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """`{"name": …, "parameters": …}`, several with `;` between them."""
    yield from json_call(reader, out)
    yield from reader.skip_space()
    while (yield from reader.accept(";", "<|python_tag|>")):
        yield from json_call(reader, out)
        yield from reader.skip_space()


def _mistral(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """`[TOOL_CALLS][{"name": …}, …]`, or since 2025 `[TOOL_CALLS]name[ARGS]{…}`."""
    yield from reader.skip_space()
    if (yield from reader.accept("[")):
        while True:
            yield from json_call(reader, out)
            yield from reader.skip_space()
            if (yield from reader.expect("]", ",")) == "]":
                return
    while not (head := re.search(r"\[CALL_ID\]|\[ARGS\]|\{", reader.text)):
        yield from reader.more()
    name, id = reader.take(head.start()).strip(), None
    if not name:
        raise UnparsableError("a call needs a name")
    if (yield from reader.accept("[CALL_ID]")):
        id = yield from reader.until("[ARGS]")
    else:
        yield from reader.accept("[ARGS]")
    out.begin_call(name, id)
    yield from json_arguments(reader, out)


SEPARATOR = "<｜tool▁sep｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _deepseek(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """V3 and R1: `function<sep>name ```json {…} ``` `; V3.1: `name<sep>{…}`."""
    yield from reader.skip_space()
    while (yield from reader.accept(CALL_BEGIN)):
        name = (yield from reader.until(SEPARATOR)).strip()
        yield from reader.skip_space()
        is_fenced = (yield from reader.next_of("{")) is None
        if is_fenced:
            name = (yield from reader.until("```json")).strip()
            yield from reader.skip_space()
        out.begin_call(name)
        yield from json_arguments(reader, out)
        yield from reader.skip_space()
        if is_fenced:
            yield from reader.accept("```")
            yield from reader.skip_space()
        yield from reader.accept(CALL_END)
        yield from reader.skip_space()
    if not reader.is_exhausted:
        yield from reader.expect(CALLS_END)


def _kimi(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`"""
    yield from reader.skip_space()
    while (yield from reader.accept("<|tool_call_begin|>")):
        id = (yield from reader.until("<|tool_call_argument_begin|>")).strip()
        name = id.removeprefix("functions.").rpartition(":")[0] or id
        yield from reader.skip_space()
        out.begin_call(name, id)
        yield from json_arguments(reader, out)
        yield from reader.skip_space()
        yield from reader.accept("<|tool_call_end|>")
        yield from reader.skip_space()
    if not reader.is_exhausted:
        yield from reader.expect("<|tool_calls_section_end|>")


FORMATS = (
    ToolFormat("hermes", _hermes, starts=("<tool_call>",), tokens=("<tool_call>", "</tool_call>")),
    ToolFormat(
        "llama3_json", _llama, starts=("<|python_tag|>",), bare="{", tokens=("<|python_tag|>",)
    ),
    ToolFormat(
        "mistral",
        _mistral,
        starts=("[TOOL_CALLS]",),
        tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_letters=9,
    ),
    ToolFormat(
        "deepseek",
        _deepseek,
        starts=(CALLS_BEGIN,),
        tokens=(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR),
    ),
    ToolFormat(
        "kimi_k2",
        _kimi,
        starts=("<|tool_calls_section_begin|>",),
        tokens=(
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ),
)
