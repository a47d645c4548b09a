"""Answers in the real formats, written from their public descriptions, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mlx_lm_server.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from mlx_lm_server.parsing.message_parser import AnswerFormat, MessageParser
from mlx_lm_server.parsing.tool_formats.format import ToolSchemas

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "note": {"type": ["string", "null"]},
                "where": {"type": "object"},
            },
            "required": ["city"],
        },
    },
}
SCHEMAS = ToolSchemas([WEATHER])
THINK = REASONING_FORMATS["think"]

Call = tuple[str, dict[str, Any]]


@dataclass
class Said:
    """All that a parser gave, put together as a client does."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    warnings: int = 0
    broken: list[int] = field(default_factory=list)

    def parsed_calls(self) -> list[Call]:
        good = [call for i, call in self.calls.items() if i not in self.broken]
        return [(name, json.loads(arguments)) for name, arguments in good]


def read(answer: AnswerFormat, pieces: list[str], *, is_cut: bool = False) -> Said:
    parser, said = MessageParser(answer), Said()
    deltas = [parser.push(piece) for piece in pieces]
    for delta in [*deltas, parser.flush(is_cut=is_cut)]:
        said.content += delta.content
        said.reasoning += delta.reasoning
        said.warnings += len(delta.warnings)
        if delta.broken_call is not None:
            said.broken.append(delta.broken_call)
        for call in delta.calls:
            if call.name is not None:
                assert call.id
                assert call.index == len(said.calls)
                said.calls[call.index] = [call.name, ""]
                said.ids.append(call.id)
            said.calls[call.index][1] += call.arguments
    return said


def tool_answer(name: str, *, is_open: bool = False) -> AnswerFormat:
    if name == "harmony":
        return AnswerFormat(is_harmony=True, schemas=SCHEMAS)
    return AnswerFormat(THINK, TOOL_FORMATS[name], is_open=is_open, schemas=SCHEMAS)


PARIS: Call = ("get_weather", {"city": "Paris"})
FULL: Call = ("get_weather", {"city": 'a "quoted"\nline', "days": 3, "where": {"x": [1, None]}})
ROME: Call = ("get_weather", {"city": "Rome", "days": 2})

# format, text, content, calls
RECORDINGS: list[tuple[str, str, str, list[Call]]] = [
    (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call>",
        "Let me look.",
        [PARIS],
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a \\"quoted\\"\\nline", '
        '"days": 3, "where": {"x": [1, null]}}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"city": "Rome", "days": 2}, "name": "get_weather"}\n</tool_call>',
        "",
        [FULL, ROME],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>done',
        "done",
        [PARIS],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "two\nlines </tool_call>"}}</tool_call>',
        "",
        [("f", {"s": "two\nlines </tool_call>"})],
    ),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [PARIS],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": '
        '"Paris"}}; {"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}',
        "",
        [PARIS, ROME],
    ),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", "  {not json", "  {not json", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}]',
        "",
        [PARIS, ROME],
    ),
    (
        "mistral",
        'Yes.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
        '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome", "days": 2}',
        "Yes.",
        [PARIS, ROME],
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
        'get_weather\n```json\n{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "",
        [PARIS, ROME],
    ),
    (
        "deepseek",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "Hm.",
        [PARIS],
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "",
        [ROME],
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>'
        'functions.get_weather:1<|tool_call_argument_begin|>{"city": "Rome", "days": 2}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [PARIS, ROME],
    ),
    (
        "qwen3_coder",
        "I will.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
        'a "quoted"\nline\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        '<parameter=where>\n{"x": [1, null]}\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I will.",
        [FULL, ("now", {})],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>Rome</parameter>"
        "<parameter=note>null</parameter></function></tool_call>",
        "",
        [("get_weather", {"city": "Rome", "note": None})],
    ),
    (
        "glm",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        "<tool_call>now</tool_call>",
        "",
        [ROME, ("now", {})],
    ),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n</invoke>\n<invoke name="get_weather">\n<parameter name="city">Rome'
        '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
        "",
        [PARIS, ROME],
    ),
    (
        "pythonic",
        "[get_weather(city=\"Paris\"), get_weather(city='Rome', days=2)]",
        "",
        [PARIS, ROME],
    ),
    (
        "pythonic",
        '<|tool_call_start|>[f(a=-1.5, b=[true, None], c={"k": "v)]"})]<|tool_call_end|>Done.',
        "Done.",
        [("f", {"a": -1.5, "b": [True, None], "c": {"k": "v)]"}})],
    ),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Rome, {it}<|"|>,days:2}<tool_call|>',
        "",
        [("get_weather", {"city": "Rome, {it}", "days": 2})],
    ),
    (
        "function_gemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        "",
        [PARIS],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary"
        ' to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "",
        [PARIS],
    ),
    (
        "harmony",
        "<|channel|>final<|message|>It is warm.<|return|>",
        "It is warm.",
        [],
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>Two calls:<|end|><|start|>assistant to=functions."
        'get_weather<|channel|>commentary json<|message|>{"city": "Rome", "days": 2}',
        "Two calls:",
        [ROME],
    ),
]

# format, text, words that must come back as content, calls that are fine
BROKEN: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "a <tool_call>no json</tool_call> b", "a <tool_call>no json</tool_call> b", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "<tool_call>", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>', "{a: 1}}", []),
    ("hermes", "<tool_call>", "<tool_call>", []),
    (
        "hermes",
        '<tool_call>[]</tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "<tool_call>[]</tool_call>",
        [("f", {})],
    ),
    ("mistral", "[TOOL_CALLS] what", "[TOOL_CALLS] what", []),
    ("deepseek", "<｜tool▁calls▁begin｜>x", "<｜tool▁calls▁begin｜>x", []),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>1", "<parameter=a>1", []),
    ("glm", "<tool_call>a b c</tool_call>", "<tool_call>a b c</tool_call>", []),
    ("pythonic", "<|tool_call_start|>[f(1)]", "[f(1)]", []),
    ("gemma4", "<|tool_call>call:f{a b}<tool_call|>", "call:f{a b}", []),
    ("llama3_json", '{"name": "f", "parameters": {"a" 1}}', '{"a" 1}', []),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>no", "no", []),
]
