from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing import harmony
from mlx_lm_server.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from mlx_lm_server.server.chat_template import ChatTemplate
from mlx_lm_server.server.model_formats import ModelFormats

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_the_flags_offer_every_format() -> None:
    hints = get_type_hints(ModelConfig)
    assert set(get_args(hints["tool_call_parser"])) == {"auto", "none", *TOOL_FORMATS}
    names = {"auto", "none", harmony.NAME, *REASONING_FORMATS}
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


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_harmony_is_read_as_a_whole(flag: str) -> None:
    config = ModelConfig(**{flag: "harmony"})  # type: ignore[arg-type]
    formats = ModelFormats.of(config, "")
    answer = formats.answer("prompt", None)
    assert answer is not None
    assert answer.is_harmony
    assert formats.can_think
    assert formats.markers() == harmony.TOKENS


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
    assert template.takes_argument_objects == as_objects
