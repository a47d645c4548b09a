"""Answers in the real formats, written from their public descriptions, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mlx_lm_server.parsing.formats import CHANNEL_FORMATS, REASONING_FORMATS, TOOL_FORMATS
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
SCHEMAS = ToolSchemas([WEATHER, *({"function": {"name": name}} for name in ("f", "now"))])
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
        said.broken += delta.broken_calls
        for call in delta.calls:
            if call.name is not None:
                assert call.id
                assert call.index == len(said.calls)
                said.calls[call.index] = [call.name, ""]
                said.ids.append(call.id)
            said.calls[call.index][1] += call.arguments
    return said


def tool_answer(name: str, *, is_open: bool = False) -> AnswerFormat:
    if name in CHANNEL_FORMATS:
        return AnswerFormat(channels=CHANNEL_FORMATS[name], schemas=SCHEMAS)
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
    (
        "minimax_m3",
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Paris'
        "]<]minimax[>[</city>]<]minimax[>[</invoke>\n"
        ']<]minimax[>[<invoke name="f">]<]minimax[>[<a>]<]minimax[>[<item>1]<]minimax[>[</item>'
        "]<]minimax[>[<item>x]<]minimax[>[</item>]<]minimax[>[</a>]<]minimax[>[</invoke>\n"
        "]<]minimax[>[</tool_call>",
        "",
        [PARIS, ("f", {"a": [1, "x"]})],
    ),
    (
        "solar",
        "<|tool_calls|><|tool_call:begin|>abc<|tool_call:name|>get_weather<|tool_call:args|>"
        '{"city": "Paris"}<|tool_call:end|><|tool_call:begin|>abd<|tool_call:name|>get_weather'
        '<|tool_call:args|>{"city": "Rome", "days": 2}<|tool_call:end|><|calls|>',
        "",
        [PARIS, ROME],
    ),
    (
        "functionary_v31",
        'Yes.<function=get_weather>{"city": "Paris"}</function><function=get_weather>'
        '{"city": "Rome", "days": 2}</function>',
        "Yes.",
        [PARIS, ROME],
    ),
    (
        "functionary_v32",
        '>>>all\nLet me look.>>>get_weather\n{"city": "Paris"}>>>get_weather\n'
        '{"city": "Rome", "days": 2}',
        "Let me look.",
        [PARIS, ROME],
    ),
    (
        "apertus",
        'Hm.<|tools_prefix|>[{"get_weather": {"city": "Paris"}}, {"now": {}}]<|tools_suffix|>',
        "Hm.",
        [PARIS, ("now", {})],
    ),
    (
        "kimi_k3",
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument '
        'key="city" type="string"<|sep|>Rome<|close|>argument<|sep|><|open|>argument key="days" '
        'type="number"<|sep|>2<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
        "",
        [ROME],
    ),
    (
        "seed_oss",
        "I will.\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n"
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
        "I will.",
        [ROME],
    ),
    (
        "cohere",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        '{"city": "Paris"}},\n    {"tool_call_id": "1", "tool_name": "get_weather", "parameters": '
        '{"city": "Rome", "days": 2}}\n]<|END_ACTION|>',
        "",
        [PARIS, ROME],
    ),
    (
        "command_r",
        'Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n'
        '            "city": "Paris"\n        }\n    }\n]```',
        "",
        [PARIS],
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": '
        '"get_weather", "arguments": {"city": "Rome", "days": 2}}]',
        "",
        [PARIS, ROME],
    ),
    (
        "granite_20b",
        '<function_call> {"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '<function_call> {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n',
        "",
        [PARIS, ROME],
    ),
    (
        "nemotron",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>',
        "",
        [PARIS],
    ),
    (
        "tool_calls",
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n{"name": '
        '"get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_calls>',
        "",
        [PARIS, ROME],
    ),
    (
        "hunyuan",
        "<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n</tool_call>\n</tool_calls>",
        "",
        [PARIS],
    ),
    (
        "longcat",
        '<longcat_tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        "</longcat_tool_call>",
        "",
        [PARIS],
    ),
    (
        "internlm",
        'Yes.<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Paris"}}'
        "<|action_end|>",
        "Yes.",
        [PARIS],
    ),
    (
        "phi4_mini",
        '<|tool_call|>[{"type": "function", "function": {"name": "get_weather", "arguments": '
        '{"city": "Paris"}}}]<|/tool_call|>',
        "",
        [PARIS],
    ),
    ("phi4_mini", "functools.partial is one", "functools.partial is one", []),
    (
        "firefunction",
        ' functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        "",
        [PARIS],
    ),
    (
        "gigachat",
        "Yes.<|message_sep|>\n\nfunction call<|role_sep|>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        "Yes.",
        [PARIS],
    ),
    (
        "xlam",
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "now", "arguments": {}}]',
        "",
        [PARIS, ("now", {})],
    ),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[Rome]]></param><param '
        'name="days">2</param></function>\n<function name="now"></function>',
        "",
        [ROME, ("now", {})],
    ),
    (
        "step3",
        "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke "
        'name="get_weather"><steptml:parameter name="city">Paris</steptml:parameter>'
        "</steptml:invoke><｜tool_call_end｜>",
        "",
        [PARIS],
    ),
    (
        "lfm2",
        "<|tool_call_start|>[get_weather(city='it's \"here\"', days=2), now()]<|tool_call_end|>",
        "",
        [("get_weather", {"city": 'it\'s "here"', "days": 2}), ("now", {})],
    ),
    (
        "olmo3",
        '<function_calls>\nget_weather(city="Paris")\nget_weather(city="Rome", days=2)\n'
        "</function_calls>",
        "",
        [PARIS, ROME],
    ),
    (
        "muse",
        ' to=get_weather<|message|><atem:function_calls>\n<atem:invoke name="get_weather">\n'
        '<atem:parameter name="city">Paris</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls><|eot|>",
        "",
        [PARIS],
    ),
    (
        "muse",
        " to=user<|message|>It is warm.<|eot|>",
        "It is warm.",
        [],
    ),
    # what vendors' own parsers let through
    (
        "qwen3_coder",
        'Sure.\n<function="get_weather">\n<parameter="city">\nRome\n<parameter=days>\n2\n'
        "</parameter>\n</function>\n</tool_call>",
        "Sure.",
        [ROME],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=where>\n{'x': [True, None]}\n</parameter>\n</function>\n</tool_call>",
        "",
        [("get_weather", {"city": "Rome", "where": {"x": [True, None]}})],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</tool_call>\n<tool_call>\n"
        "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        [PARIS, ROME],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "args": {"city": "Paris"}}</tool_call>'
        '<tool_call>{"name": "get_weather", "city": "Rome", "days": 2}</tool_call>',
        "",
        [PARIS, ROME],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "input": {"city": "Paris"}}</tool_call>',
        "",
        [PARIS],
    ),
    (
        "kimi_k2",
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}',
        "",
        [PARIS],
    ),
    (
        "deepseek_v32",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        "",
        [PARIS],
    ),
    (
        "llama3_json",
        '<|python_start|>Sure.<|python_end|>{"name": "get_weather", "parameters": '
        '{"city": "Paris"}}',
        "Sure.",
        [PARIS],
    ),
    (
        "llama3_json",
        'Here: {"name": "get_weather", "parameters": {"city": "Paris"}}',
        "Here:",
        [PARIS],
    ),
    (
        "llama3_json",
        'Here: {"name": "Bob", "age": 4} is one.',
        'Here: {"name": "Bob", "age": 4} is one.',
        [],
    ),
    (
        "pythonic",
        "[get_weather(\n  city='two\nlines',\n  days=2\n),]",
        "",
        [("get_weather", {"city": "two\nlines", "days": 2})],
    ),
    (
        "pythonic",
        '<|tool_call_start|>[f(from="a", x-y=1, c="5\\" [disk")]<|tool_call_end|>',
        "",
        [("f", {"from": "a", "x-y": 1, "c": '5" [disk'})],
    ),
    (
        "gemma4",
        "<|tool_call>call:get_weather{city:Rome,note:None,days:2}<tool_call|>",
        "",
        [("get_weather", {"city": "Rome", "note": None, "days": 2})],
    ),
    (
        "harmony",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        "",
        [PARIS],
    ),
    (
        "harmony",
        "<|channel|>commentary to=assistant<|channel|>analysis<|message|>Hm.<|end|><|start|>"
        "assistant<|channel|>final<|message|>Done.",
        "Done.",
        [],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>It is warm.",
        "It is warm.",
        [],
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
    ("harmony", "<|channel|>commentary to=functions.nope<|message|>{}", "to=functions.nope", []),
    ("hermes", '<tool_call>{"name": "nope", "arguments": {}}</tool_call>', '"nope"', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN", []),
    (
        "qwen3_coder",
        "<tool_call><function=nope><parameter=a>1</parameter></function></tool_call>",
        "<function=nope>",
        [],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=days>soon</parameter></function></tool_call>",
        "soon",
        [],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=days>NaN</parameter></function></tool_call>",
        "NaN",
        [],
    ),
    ("pythonic", "<|tool_call_start|>[nope(a=1)]<|tool_call_end|>", "[nope(a=1)]", []),
]
