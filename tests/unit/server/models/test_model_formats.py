from __future__ import annotations

import re
from typing import get_args, get_type_hints

import pytest

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing.channels import HARMONY
from mlx_lm_server.parsing.formats import (
    CHANNEL_FORMATS,
    REASONING_FORMATS,
    TOOL_FORMATS,
)
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.thinking import ThinkingMarks

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_the_flags_offer_every_format() -> None:
    hints = get_type_hints(ModelConfig)
    names = {"auto", "none", *TOOL_FORMATS, *CHANNEL_FORMATS}
    assert set(get_args(hints["tool_call_parser"])) == names
    names = {"auto", "none", *REASONING_FORMATS, *CHANNEL_FORMATS}
    assert set(get_args(hints["reasoning_parser"])) == names


def test_text_stays_whole_where_there_is_nothing_to_tell_apart() -> None:
    plain = ModelFormats.of(ModelConfig(), "{{ messages }}")
    assert plain.answer("prompt", None) is None
    assert plain.answer("prompt", TOOLS) is None
    hermes = ModelFormats.of(ModelConfig(), "<tool_call>")
    assert hermes.answer("prompt", None) is None
    assert hermes.answer("prompt", TOOLS) is not None


def test_the_prompts_end_says_whether_it_thinks_already() -> None:
    thinking = ModelFormats.of(ModelConfig(), "<think>")
    opened, closed = (thinking.answer(p, None) for p in ("a<think>\n", "a<think></think>"))
    assert opened is not None
    assert closed is not None
    assert (opened.is_open, closed.is_open) == (True, False)


class Words:
    """A tokenizer of the tokens of Harmony, a word each."""

    TOKENS = (*HARMONY.tokens, "assistant", "analysis", "final")

    def id_of(self, token: str) -> int | None:
        return self.TOKENS.index(token) if token in self.TOKENS else None

    def ids_of(self, text: str) -> list[int]:
        return [self.TOKENS.index(one) for one in re.findall(r"<[^>]*>|\w+", text)]


def test_harmony_goes_on_with_the_answer_or_where_it_may_call_with_the_next_message() -> None:
    marks = ThinkingMarks.of(ModelFormats(channels=HARMONY), Words())
    assert marks is not None
    answer, call = (
        [Words.TOKENS[i] for i in marks.budget(4, is_open=False, has_tools=has).forced_ids]
        for has in (False, True)
    )
    assert call == ["<|end|>", "<|start|>", "assistant"]
    assert answer == [*call, "<|channel|>", "final", "<|message|>"]
    start = [Words.TOKENS[i] for i in marks.start_ids]
    assert start == ["<|channel|>", "analysis", "<|message|>"]


def test_a_model_that_does_not_think_has_no_marks() -> None:
    assert ThinkingMarks.of(ModelFormats(), Words()) is None


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_harmony_is_read_as_a_whole(flag: str) -> None:
    config = ModelConfig(**{flag: "harmony"})  # type: ignore[arg-type]
    formats = ModelFormats.of(config, "")
    answer = formats.answer("prompt", None)
    assert answer is not None
    assert answer.whole is HARMONY
    assert formats.can_think
    assert formats.markers() == HARMONY.tokens


@pytest.mark.parametrize(
    ("written", "as_objects"),
    [
        ("{{ c.function.arguments | tojson }}", True),
        ("{% for k, v in c.function.arguments | items %}{{ k }}{% endfor %}", True),
        ("{{ c.function.arguments }}", False),
        ("{{ 'x' + c.function.arguments }}", False),
    ],
)
def test_a_template_gets_arguments_as_it_writes_them(written: str, as_objects: bool) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + written
    template = ChatTemplate(source + "{% endfor %}{% endfor %}", {})
    assert template.traits.calls.takes_objects == as_objects
