from __future__ import annotations

import pytest
from tests.unit.parsing.recordings import THINK, read, tool_answer

from mlx_lm_server.parsing.channels import HARMONY
from mlx_lm_server.parsing.formats import (
    REASONING_FORMATS,
    channels_in,
    find_reasoning_format,
    find_tool_format,
)
from mlx_lm_server.parsing.message_parser import AnswerFormat


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_each_family_keeps_its_thoughts_apart(name: str) -> None:
    one = REASONING_FORMATS[name]
    text = f"{one.start}\nfirst I think\n{one.end}\n\nthen I say"
    said = read(AnswerFormat(one), [text])
    assert (said.reasoning, said.content) == ("first I think", "then I say")


def test_a_prompt_may_open_the_reasoning() -> None:
    answer = AnswerFormat(THINK, is_open=True)
    said = read(answer, ["thoughts\n</think>\n\nanswer"])
    assert (said.reasoning, said.content) == ("thoughts", "answer")
    assert THINK.is_open_after("<|im_start|>assistant\n<think>\n")
    assert not THINK.is_open_after("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_an_answer_that_only_thinks() -> None:
    said = read(AnswerFormat(THINK), ["<think>on and on "], is_cut=True)
    assert (said.reasoning, said.content) == ("on and on", "")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("plain\n", "", "plain\n"),
        ("<think></think>x", "", "x"),
        ("a</think>b", "", "ab"),
        ("<think>a<think>b</think>c", "ab", "c"),
        ("a <think>b</think> c <think>d</think>", "bd", "ac"),
        ("1 < 2 <thinking", "", "1 < 2 <thinking"),
        ("<think", "", "<think"),
        ("<think>a</thi", "a</thi", ""),  # what ends within a mark is text of its part
    ],
)
def test_odd_answers_never_show_a_tag(text: str, reasoning: str, content: str) -> None:
    said = read(AnswerFormat(THINK), [text])
    assert (said.reasoning, said.content) == (reasoning, content)


def test_a_call_within_the_reasoning_is_reasoning() -> None:
    text = '<think>maybe <tool_call>{"name": "f"}</tool_call></think>no'
    said = read(tool_answer("hermes"), [text])
    assert (said.content, said.calls) == ("no", {})
    assert "<tool_call>" in said.reasoning


def test_harmony_keeps_the_analysis_apart() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    said = read(tool_answer("harmony"), [text])
    assert (said.reasoning, said.content) == ("Hm.", "Hi")


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("<tool_call>\n{'name'", "hermes", None),
        ("<tool_call>\n<function=x", "qwen3_coder", None),
        ("<tool_call>{{ name }}<arg_key> <think>", "glm", "think"),
        ("[TOOL_CALLS] [THINK]", "mistral", "magistral"),
        ("{{ messages }}", None, None),
    ],
)
def test_the_template_tells_the_formats(
    template: str, tools: str | None, reasoning: str | None
) -> None:
    found, thinks = find_tool_format(template), find_reasoning_format(template)
    assert (found.name if found else None, thinks.name if thinks else None) == (tools, reasoning)


def test_the_template_tells_of_channels() -> None:
    assert channels_in("<|start|><|channel|>x<|message|>") is HARMONY
    assert channels_in("<|start|>x") is None
