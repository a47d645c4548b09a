from __future__ import annotations

from typing import Any

import pytest

from mlx_lm_server.errors import ConfigError, InvalidRequestError, ModelError
from mlx_lm_server.server.models.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or USER, variables)


def test_it_sees_messages_special_tokens_and_variables() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ x }}{{ add_generation_prompt }}"
    assert render(source, x=1) == "<s>hi1True"


def test_blocks_leave_no_white_space() -> None:
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_json_keeps_its_letters() -> None:
    assert render("{{ x | tojson }}", x={"a": "<ü>"}) == '{"a": "<ü>"}'
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"


def test_loops_can_be_left() -> None:
    loop = "{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "1"


def test_the_generation_tag_is_its_body() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(source) == "hi"


def test_the_date_is_there() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no way') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(999999999) }}",
        "{{ messages | first('x') }}",
        "{%- macro f() -%}{{ f() }}{%- endmacro -%}{{ f() }}",
        "{{ x.y.z }}",
    ],
)
def test_whatever_goes_wrong_in_it_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_its_own_message_is_passed_on() -> None:
    with pytest.raises(InvalidRequestError, match="no way"):
        render("{{ raise_exception('no way') }}")


def test_what_does_not_compile_is_a_model_error() -> None:
    with pytest.raises(ModelError):
        ChatTemplate("{% if %}", {})


def test_reserved_names_cannot_be_set() -> None:
    with pytest.raises(InvalidRequestError):
        render("", tools=[])
    with pytest.raises(ConfigError):
        ChatTemplate("", {"tools": []})


def test_another_template_is_rendered_where_tools_are_given() -> None:
    template = ChatTemplate("{{ a }}", {}, tool_use="{{ tools | length }} tools {{ b }}")
    assert template.render(USER, {}) == ""
    assert template.render(USER, {}, [{"type": "function"}]) == "1 tools "
    assert template.render(USER, {}, []) == "0 tools "
    assert template.reads("a")
    assert template.reads("b")
    with pytest.raises(ModelError):
        ChatTemplate("", {}, tool_use="{% if %}")
