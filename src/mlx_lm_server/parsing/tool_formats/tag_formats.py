"""Formats that write each argument between tags; its type comes from the tool's schema."""

from __future__ import annotations

import re

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import (
    ArgumentWriter,
    ReadCalls,
    ToolFormat,
    ToolSchemas,
)


def _coder(reader: Reader, out: MessageBuilder, schemas: ToolSchemas) -> Script[None]:
    """`<function=name><parameter=key>value</parameter></function></tool_call>`"""
    yield from reader.skip_space()
    while (yield from reader.accept("<function=")):
        name = yield from reader.until(">")
        writer = ArgumentWriter(name.strip(), out, schemas)
        yield from reader.skip_space()
        while (yield from reader.accept("<parameter=")):
            key = yield from reader.until(">")
            yield from writer.read(key.strip(), reader, "</parameter>")
            yield from reader.skip_space()
        yield from reader.expect("</function>")
        writer.end()
        yield from reader.skip_space()
    if not reader.is_exhausted:
        yield from reader.expect("</tool_call>")


def _glm(reader: Reader, out: MessageBuilder, schemas: ToolSchemas) -> Script[None]:
    """`name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`"""
    while not (tag := re.search(r"<arg_key>|</tool_call>", reader.text)):
        yield from reader.more()
    name = reader.take(tag.start()).strip()
    if not re.fullmatch(r"[\w.:/-]+", name):
        raise UnparsableError("a call needs a name")
    writer = ArgumentWriter(name, out, schemas)
    while (yield from reader.expect("</tool_call>", "<arg_key>")) == "<arg_key>":
        key = yield from reader.until("</arg_key>")
        yield from reader.skip_space()
        yield from reader.expect("<arg_value>")
        yield from writer.read(key.strip(), reader, "</arg_value>")
        yield from reader.skip_space()
    writer.end()


def _invocations(call: str, argument: str, end: str) -> ReadCalls:
    """`<call name="…"><argument name="…">value</argument></call> end`, several of them."""

    def read(reader: Reader, out: MessageBuilder, schemas: ToolSchemas) -> Script[None]:
        yield from reader.skip_space()
        while (yield from reader.accept(f"<{call} name=")):
            writer = ArgumentWriter(_unquoted((yield from reader.until(">"))), out, schemas)
            yield from reader.skip_space()
            while (yield from reader.accept(f"<{argument} name=")):
                head = yield from reader.until(">")
                key, _, flag = head.partition(" ")
                is_text = {'string="true"': True, 'string="false"': False}.get(flag.strip())
                yield from writer.read(_unquoted(key), reader, f"</{argument}>", is_text)
                yield from reader.skip_space()
            yield from reader.expect(f"</{call}>")
            writer.end()
            yield from reader.skip_space()
        if not reader.is_exhausted:
            yield from reader.expect(end)

    return read


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")


DSML_END = "</｜DSML｜function_calls>"

FORMATS = (
    ToolFormat(
        "qwen3_coder", _coder, starts=("<tool_call>",), tokens=("<tool_call>", "</tool_call>")
    ),
    ToolFormat(
        "glm",
        _glm,
        starts=("<tool_call>",),
        tokens=(
            *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
            *("<arg_value>", "</arg_value>"),
        ),
    ),
    ToolFormat(
        "minimax_m2",
        _invocations("invoke", "parameter", "</minimax:tool_call>"),
        starts=("<minimax:tool_call>",),
        tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    ToolFormat(
        "deepseek_v32",
        _invocations("｜DSML｜invoke", "｜DSML｜parameter", DSML_END),
        starts=("<｜DSML｜function_calls>",),
        tokens=("｜DSML｜",),
    ),
)
