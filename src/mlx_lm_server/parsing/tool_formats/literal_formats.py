"""Formats that write a call as code: Python's, and Gemma's. A call is known when it is complete."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import ReadCalls, ToolFormat, ToolSchemas, dump

# What a list of calls looks like from its first letters on.
LIST_OF_CALLS = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(.*)?)?\Z", re.DOTALL)
JSON_NAMES = {"true": True, "false": False, "null": None}


def _pythonic(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
    """`[get_time(zone="UTC"), add(a=1, b=2)]`"""
    yield from reader.skip_space()
    text = yield from _bracketed(reader)
    for name, arguments in _calls(text):
        out.call(name, dump(arguments))
    yield from reader.skip_space()
    yield from reader.accept("<|tool_call_end|>", "<|python_end|>")


def _bracketed(reader: Reader) -> Script[str]:
    """Up to the bracket that closes the first one; brackets in strings do not count."""
    depth, quote, place = 0, "", 0
    while True:
        if not LIST_OF_CALLS.match(reader.text):
            raise UnparsableError("no list of calls")
        while place < len(reader.text):
            letter = reader.text[place]
            place += 1
            if quote:
                if letter == "\\":
                    place += 1
                elif letter == quote:
                    quote = ""
            elif letter in "\"'":
                quote = letter
            elif letter in "[({":
                depth += 1
            elif letter in "])}":
                depth -= 1
                if depth <= 0:
                    return reader.take(place)
        yield from reader.more()


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnparsableError(f"no Python: {error}") from error
    if not isinstance(tree, ast.List) or not tree.elts:
        raise UnparsableError("no list of calls")
    return [_call(node) for node in tree.elts]


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise UnparsableError("calls take named arguments only")
    arguments = {word.arg: _literal(word.value) for word in node.keywords}
    if None in arguments:
        raise UnparsableError("calls take named arguments only")
    return ast.unparse(node.func), {str(key): value for key, value in arguments.items()}


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in JSON_NAMES:
            return JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_literal(k)): _literal(v) for k, v in pairs if k is not None}
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise UnparsableError("an argument is no literal")


def _gemma(quote: str, end: str) -> ReadCalls:
    """`call:name{key:<quote>text<quote>,other:1}`: JSON with bare keys and odd quotes."""

    def read(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas) -> Script[None]:
        text = yield from reader.until(end)
        found = re.fullmatch(r"\s*call:([\w.-]+)\s*(\{.*\})\s*", text, re.DOTALL)
        if found is None:
            raise UnparsableError("no call")
        out.call(found[1], _json_of(found[2], quote))

    return read


def _json_of(text: str, quote: str) -> str:
    parts = text.split(quote)
    parts[1::2] = [dump(part) for part in parts[1::2]]
    parts[::2] = [re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
    try:
        return dump(json.loads("".join(parts)))
    except ValueError as error:
        raise UnparsableError(str(error)) from error


FORMATS = (
    ToolFormat(
        "pythonic",
        _pythonic,
        starts=("<|tool_call_start|>", "<|python_start|>"),
        bare="[",
        tokens=("<|tool_call_start|>", "<|tool_call_end|>", "<|python_start|>", "<|python_end|>"),
    ),
    ToolFormat(
        "gemma4",
        _gemma('<|"|>', "<tool_call|>"),
        starts=("<|tool_call>",),
        tokens=("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    ToolFormat(
        "function_gemma",
        _gemma("<escape>", "<end_function_call>"),
        starts=("<start_function_call>",),
        tokens=("<start_function_call>", "<end_function_call>", "<escape>"),
    ),
)
