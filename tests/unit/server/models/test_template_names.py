from __future__ import annotations

import pytest

from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.template_names import TemplateNames


def names(source: str) -> TemplateNames:
    return ChatTemplate(source, {}).names


def test_words_in_prose_are_no_variables() -> None:
    found = names("Show your thinking. {# enable_thinking #}{{ messages[0].content }}")
    assert found.variables == {"messages"}
    assert not ChatTemplate("enable_thinking", {}).reads("enable_thinking")


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}",
        "{% if x is defined and x %}a{% endif %}",
        "{% set x = x | default(true) %}{{ x }}",
        "{%- macro f() -%}{{ x }}{%- endmacro -%}{{ f() }}",
    ],
)
def test_a_variable_is_what_whoever_renders_may_set(source: str) -> None:
    assert "x" in names(source).variables


def test_what_the_template_sets_itself_is_none() -> None:
    found = names("{% set y = 1 %}{{ y }}{% for m in messages %}{{ m }}{% endfor %}")
    assert found.variables == {"messages"}


def test_attributes_are_found_however_they_are_looked_up() -> None:
    source = (
        "{{ m.a }}{{ m['b'] }}{{ m.get('c') }}{% if 'd' in m %}{% endif %}"
        "{% if m is mapping and 'e' not in m %}{% endif %}"
    )
    assert {"a", "b", "c", "d", "e"} <= names(source).attributes


@pytest.mark.parametrize(
    "source",
    [
        "{% if x == 'low' or x == 'high' %}a{% endif %}",
        "{% if x not in ['low', 'high'] %}a{% endif %}",
        "{% set y = x | default('low') | lower %}{% if y in ('low', 'high') %}a{% endif %}",
        "{% set t = {'low': 1, 'high': 2} %}{{ t[x] }}",
        "{{ {'low': 1, 'high': 2}[x] }}",
        "{% if x.lower() in ['low', 'high'] %}a{% endif %}",
    ],
)
def test_the_words_that_a_variable_may_be_are_found(source: str) -> None:
    assert names(source).words["x"] == {"low", "high"}


def test_a_members_words_are_not_the_objects() -> None:
    assert "messages" not in names("{% if messages[0].role == 'system' %}a{% endif %}").words


def test_both_templates_of_a_model_count() -> None:
    template = ChatTemplate("{{ a }}", {}, tool_use="{{ b }}")
    assert template.names.variables == {"a", "b"}
    assert "{{ a }}" in template.source
    assert "{{ b }}" in template.source
