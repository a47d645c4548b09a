from __future__ import annotations

from typing import Any

import pytest

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.thinking_switches import NO_EFFORT, Thinking, thinking_of

END = "{{ 'on' if X else 'off' }}"


def thinking(
    source: str,
    effort: str | None = None,
    *,
    can_think: bool = True,
    ends: bool = False,
    **given: Any,
) -> Thinking:
    template = ChatTemplate(source, {})
    return thinking_of(given, effort, template, can_think=can_think, can_be_ended=ends)


@pytest.mark.parametrize(
    ("source", "on", "off"),
    [
        (
            END.replace("X", "enable_thinking"),
            {"enable_thinking": True},
            {"enable_thinking": False},
        ),
        (END.replace("X", "thinking"), {"thinking": True}, {"thinking": False}),
        (
            "{% if thinking_mode == 'disabled' %}no{% endif %}"
            "{% if thinking_mode == 'enabled' %}yes{% endif %}",
            {"thinking_mode": "enabled"},
            {"thinking_mode": "disabled"},
        ),
        (
            "{% if reasoning_effort == 'no_think' %}no{% elif reasoning_effort == 'high' %}yes"
            "{% endif %}",
            {"reasoning_effort": "high"},
            {"reasoning_effort": "no_think"},
        ),
        ("{% if thinking_budget == 0 %}no{% endif %}", {}, {"thinking_budget": 0}),
    ],
)
def test_the_switch_is_found_whatever_it_is_called(
    source: str, on: dict[str, Any], off: dict[str, Any]
) -> None:
    assert thinking(source, enable_thinking=True).variables == on
    assert thinking(source, enable_thinking=False).variables == off


def test_a_variable_of_a_like_name_that_changes_nothing_is_no_switch() -> None:
    source = "{% set a = thinking %}{{ messages[0].content }}"
    with pytest.raises(InvalidRequestError, match="always thinks") as caught:
        thinking(source, enable_thinking=False)
    assert caught.value.param == "chat_template_kwargs.enable_thinking"
    assert thinking(source, enable_thinking=True).variables == {}


def test_the_templates_own_variable_goes_as_it_is() -> None:
    assert thinking("{{ thinking_mode }}", thinking_mode="any").variables == {
        "thinking_mode": "any"
    }
    with pytest.raises(InvalidRequestError, match="no variable `mood`"):
        thinking("{{ messages }}", mood=1)


def test_an_effort_is_told_in_the_words_of_the_template() -> None:
    source = "{% if reasoning_effort not in ['low', 'max'] %}{{ raise_exception('no') }}{% endif %}"
    source = "{% if reasoning_effort is defined %}" + source + "{% endif %}"
    assert thinking(source, "low").variables == {"reasoning_effort": "low"}
    assert thinking(source, "xhigh").variables == {"reasoning_effort": "max"}
    medium = thinking(source, "medium")
    assert (medium.variables, medium.warnings) == ({}, (NO_EFFORT,))


def test_an_effort_that_is_written_as_it_is_may_be_any() -> None:
    source = "Effort: {{ reasoning_effort | default('medium') }}"
    assert thinking(source, "minimal").variables == {"reasoning_effort": "minimal"}


def test_an_effort_turns_a_switch() -> None:
    source = END.replace("X", "thinking")
    assert thinking(source, "none").variables == {"thinking": False}
    assert thinking(source, "high").variables == {"thinking": True}


def test_what_cannot_be_switched_off_is_ended_or_told_of() -> None:
    assert thinking("{{ messages }}", "none", ends=True).ends
    assert thinking("{{ messages }}", "none").warnings == (NO_EFFORT,)
    assert thinking("{{ messages }}", "high").warnings == (NO_EFFORT,)
    assert thinking("{{ messages }}", "none", can_think=False) == Thinking()
