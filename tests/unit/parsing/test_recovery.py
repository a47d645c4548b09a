"""What comes after text that looked like a call is read as if it had come alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.parsing.recordings import PARIS, SCHEMAS, read, tool_answer

from mlx_lm_server.parsing.formats import CHANNEL_FORMATS
from mlx_lm_server.parsing.message_parser import MAX_UNLIKELY, AnswerFormat, MessageParser
from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.tool_formats.code_calls import PythonCalls
from mlx_lm_server.parsing.tool_formats.format import ToolSchemas, dump, load

GOOD = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.mark.parametrize(
    ("name", "text", "content", "num_warnings"),
    [
        ("hermes", '<tool_call>{"name": "nope", "arguments": {}} ' + GOOD, None, 1),
        ("hermes", "<tool_call>I would call it so: " + GOOD, None, 1),
        ("hermes", "<tool_call>" + GOOD, "<tool_call>", 1),
        ("qwen3_coder", "<tool_call><function=nope>x</function></tool_call> a", None, 1),
    ],
)
def test_only_the_mark_that_misled_is_text_and_calls_behind_it_are_calls(
    name: str, text: str, content: str | None, num_warnings: int
) -> None:
    for pieces in ([text], list(text)):
        said = read(tool_answer(name), pieces)
        expected = text.removesuffix(GOOD).rstrip() if content is None else content
        assert (said.content, said.warnings) == (expected, num_warnings)
        assert said.parsed_calls() == ([PARIS] if text.endswith(GOOD) else [])


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<|channel|>final The answer is 42.", "The answer is 42.", ""),
        ("<|channel|>analysis We add. <|channel|>final<|message|>42", "42", "We add."),
        ("<|channel|>final " + "word " * 400, ("word " * 400), ""),
        ("<|channel|>analysis<|message|>So.<|end|><|start|>assis", "", "So."),
        ("<|channel|>commentary to=functions.f <|cons", "", ""),
    ],
)
def test_a_channel_whose_message_has_no_mark_is_not_lost(
    text: str, content: str, reasoning: str
) -> None:
    for pieces in ([text], list(text)):
        said = read(AnswerFormat(channels=CHANNEL_FORMATS["harmony"], schemas=SCHEMAS), pieces)
        assert (said.content, said.reasoning) == (content, reasoning)


def test_a_likely_mark_that_is_none_stays_a_word() -> None:
    text = "the word functools[0] is code, functools[" + '{"name": "get_weather", "arguments": {'
    said = read(tool_answer("firefunction"), [text + '"city": "Paris"}}]'])
    assert said.content == "the word functools[0] is code,"
    assert said.parsed_calls() == [PARIS]
    many = "functools[x " * (2 * MAX_UNLIKELY)
    assert read(tool_answer("firefunction"), list(many)).content == many


def test_json_about_something_else_is_not_held_back() -> None:
    text = '{"name": "Bob", "age": 1, "rest": "' + "x" * 100
    said = read(tool_answer("llama3_json"), [text])
    assert said.content.startswith('{"name": "Bob"')
    parser = MessageParser(tool_answer("llama3_json"))
    assert parser.push(text).content == text


def test_python_joins_strings_and_has_long_ones() -> None:
    text = '[get_weather(city="""Pa"ris""", note=\'a\' "b")]'
    said = read(tool_answer("pythonic"), list(text))
    assert said.parsed_calls() == [("get_weather", {"city": 'Pa"ris', "note": "ab"})]


def test_a_long_call_as_code_is_parsed_in_proportion_to_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_parsed = 0
    parse = PythonCalls._calls

    def counting(calls: PythonCalls, text: str, is_at_end: bool) -> Any:
        nonlocal num_parsed
        num_parsed += len(text)
        return parse(calls, text, is_at_end)

    monkeypatch.setattr(PythonCalls, "_calls", counting)
    text = '[f(a="' + "f(x) \\n" * 10_000 + '")]'
    said = read(tool_answer("pythonic"), [text[i : i + 8] for i in range(0, len(text), 8)])
    assert len(said.parsed_calls()) == 1
    assert num_parsed < 25 * len(text)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", "[1e400]"])
def test_numbers_that_json_has_no_words_for_are_none(text: str) -> None:
    with pytest.raises(UnparsableError):
        load(text)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "\ud800"])
def test_what_json_cannot_say_is_not_written(value: object) -> None:
    with pytest.raises(UnparsableError):
        dump(value)


def test_schemas_that_refer_to_each_other_are_read_once() -> None:
    names = [f"d{i}" for i in range(40)]
    refs = [{"$ref": f"#/$defs/{name}"} for name in names]
    schema = {
        "$defs": {name: {"anyOf": refs} for name in names} | {"leaf": {"type": "integer"}},
        "anyOf": refs,
        "properties": {
            "x": {"anyOf": [*refs, {"$ref": "#/$defs/leaf"}]},
            "known": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/leaf"}]},
        },
    }
    schemas = ToolSchemas([{"function": {"name": "f", "parameters": json.loads(dump(schema))}}])
    assert schemas.declares("f", "x")
    assert schemas.kinds("f", "x") == set()  # what refers to itself only says nothing
    assert schemas.kinds("f", "known") == {"integer"}
