from __future__ import annotations

import pytest
from tests.unit.parsing.recordings import BROKEN, RECORDINGS, Call, read, tool_answer

from mlx_lm_server.parsing.formats import CHANNEL_FORMATS, TOOL_FORMATS
from mlx_lm_server.parsing.message_parser import AnswerFormat, MessageParser


@pytest.mark.parametrize(("name", "text", "content", "calls"), RECORDINGS)
def test_an_answer_in_each_format(name: str, text: str, content: str, calls: list[Call]) -> None:
    said = read(tool_answer(name), [text])
    assert said.parsed_calls() == calls
    assert said.content == content
    assert said.warnings == 0
    assert len(set(said.ids)) == len(calls)


@pytest.mark.parametrize(("name", "text", "content", "calls"), RECORDINGS)
def test_letter_by_letter_it_is_the_same(
    name: str, text: str, content: str, calls: list[Call]
) -> None:
    whole, letters = read(tool_answer(name), [text]), read(tool_answer(name), list(text))
    assert letters.calls == whole.calls
    assert (letters.content, letters.reasoning) == (whole.content, whole.reasoning)


@pytest.mark.parametrize(("name", "text", "words", "calls"), BROKEN)
def test_what_cannot_be_parsed_comes_back_as_text_with_a_warning(
    name: str, text: str, words: str, calls: list[Call]
) -> None:
    for pieces in ([text], list(text)):
        said = read(tool_answer(name), pieces)
        assert words in said.content
        assert said.warnings == 1
        assert said.parsed_calls() == calls


def test_every_format_has_a_recording() -> None:
    assert {name for name, *_ in RECORDINGS} == {*TOOL_FORMATS, *CHANNEL_FORMATS}


def test_arguments_come_while_they_are_written() -> None:
    parser = MessageParser(tool_answer("hermes"))
    begun = parser.push('<tool_call>{"name": "f", "arguments": {"text": "one tw').calls
    assert [(call.index, call.name, call.arguments) for call in begun] == [
        (0, "f", '{"text": "one tw')
    ]
    [more] = parser.push("o three").calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, "o three")


def test_prose_where_a_value_should_be_is_no_argument() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": hello}}</tool_call>'
    for pieces in ([text], list(text)):
        assert read(tool_answer("hermes"), pieces).calls == {0: ["f", '{"a": ']}


STREAMED = ("hermes", "llama3_json", "mistral", "deepseek", "kimi_k2", "qwen3_coder", "glm")
STREAMED += ("minimax_m2", "deepseek_v32", "harmony")


@pytest.mark.parametrize("name", STREAMED)
def test_each_letter_of_an_argument_goes_out_as_it_comes(name: str) -> None:
    texts = [one[1] for one in RECORDINGS if one[0] == name]
    text, city = next((t, c) for c in ("Paris", "Rome") for t in texts if c in t)
    parser, num_deltas = MessageParser(tool_answer(name)), 0
    before, _, after = text.partition(city)
    parser.push(before)
    for letter in "London and Rome":
        num_deltas += bool([call for call in parser.push(letter).calls if call.arguments])
    parser.push(after)
    assert num_deltas == len("London and Rome")


def test_text_arguments_between_tags_come_while_they_are_written() -> None:
    parser = MessageParser(tool_answer("qwen3_coder"))
    parser.push("<tool_call><function=get_weather><parameter=city>")
    [more] = parser.push("Par").calls
    assert more.arguments == '"Par' or more.arguments == "Par"


def test_a_call_that_the_limit_cuts_stays_a_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "b'
    said = read(tool_answer("hermes"), [text], is_cut=True)
    assert said.calls == {0: ["f", '{"a": "b']}
    assert (said.content, said.warnings) == ("", 0)


def test_a_mistral_id_has_nine_letters_and_a_kimi_id_names_its_function() -> None:
    [id] = read(tool_answer("mistral"), ["[TOOL_CALLS]f[ARGS]{}"]).ids
    assert len(id) == 9
    assert id.isalnum()
    _, text, *_ = next(one for one in RECORDINGS if one[0] == "kimi_k2")
    assert read(tool_answer("kimi_k2"), [text]).ids[0] == "functions.get_weather:0"


def test_without_tools_calls_are_text() -> None:
    answer = tool_answer("hermes")
    text = "<tool_call>{}</tool_call>"
    assert read(AnswerFormat(answer.reasoning), [text]).content == text
