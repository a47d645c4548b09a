from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from mlx_lm_server.parsing.formats import TOOL_FORMATS
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.history import for_template, object_of, short_id

USER = {"role": "user", "content": "u"}
ARGUMENTS = '{"city": "Bonn"}'


def calling(content: Any = None, id: str | None = "call_1", **more: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"function": {"name": "f", "arguments": ARGUMENTS}}
    call |= {"type": "function"} | ({} if id is None else {"id": id})
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def result(id: str | None = "call_1") -> dict[str, Any]:
    return {"role": "tool", "content": "r"} | ({} if id is None else {"tool_call_id": id})


def rendered(source: str, *messages: dict[str, Any], tools: str | None = None) -> str:
    template = ChatTemplate(source, {})
    given = [{k: v for k, v in m.items() if v is not None} for m in (USER, *messages)]
    format = TOOL_FORMATS[tools] if tools else None
    return template.render(for_template(given, template.traits, format), {})


EACH = "{% for m in messages %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}"


def test_arguments_are_objects_or_text_as_the_template_writes_them() -> None:
    as_object = EACH + CALLS + "{% endfor %}{% endfor %}"
    as_text = as_object.replace(" | tojson", "")
    assert rendered(as_object, calling()) == 'f {"city": "Bonn"}'
    assert rendered(as_text, calling()) == 'f {"city": "Bonn"}'


@pytest.mark.parametrize("field", ["description", "parameters.properties"])
def test_a_template_that_reads_all_of_a_tool_is_tried_with_one(field: str) -> None:
    source = "{% for t in tools or [] %}{{ 'x' + (t.function." + field + " | tojson) }}{% endfor %}"
    assert rendered(source + EACH + CALLS + "{% endfor %}{% endfor %}", calling()).startswith("f {")


@pytest.mark.parametrize(
    "condition", ["m.content is none", "m.content == ''", "'content' not in m", "not m.content"]
)
def test_the_content_beside_calls_is_what_lets_them_appear(condition: str) -> None:
    source = EACH + "{% if m.tool_calls and " + condition + " %}" + CALLS
    source += "{% endfor %}{% endif %}{% endfor %}"
    assert rendered(source, calling("")) == 'f {"city": "Bonn"}'
    assert rendered(source, calling(None)) == 'f {"city": "Bonn"}'


def test_a_call_that_content_would_hide_has_a_message_of_its_own() -> None:
    source = EACH + "{% if m.content %}[{{ m.content }}]{% else %}" + CALLS
    source += "{% endfor %}{% endif %}{% endfor %}"
    assert rendered(source, calling("I look.")) == '[u][I look.]f {"city": "Bonn"}'


def test_calls_that_a_template_does_not_write_are_part_of_the_content() -> None:
    source = EACH + "[{{ m.content }}]{% endfor %}"
    written = rendered(source, calling("Yes."), tools="hermes")
    assert (
        written
        == '[u][Yes.\n<tool_call>\n{"name": "f", "arguments": {"city": "Bonn"}}\n</tool_call>]'
    )
    assert "f(city='Bonn')" in rendered(source, calling(), tools="lfm2")


def test_ids_are_those_that_a_template_takes() -> None:
    source = EACH + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    source += "{{ raise_exception('nine letters') }}{% endif %}{{ c.id }}"
    source += "{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    written = rendered(source, calling(), result())
    id, _, answered = written.partition('{"city": "Bonn"}')
    assert id == answered == short_id("call_1")
    assert len(id) == 9
    assert rendered(source, calling(id="abcdefghi")).startswith("abcdefghi")


def test_an_id_names_its_function_where_nothing_else_does() -> None:
    source = EACH + "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.arguments | tojson }}"
    source += "{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    written = rendered(source, calling(), result(), calling(id="call_2"), result("call_2"))
    assert written == (
        'functions.f:0{"city": "Bonn"}functions.f:0functions.f:1{"city": "Bonn"}functions.f:1'
    )


def test_a_result_has_the_name_of_what_was_called() -> None:
    source = EACH + CALLS + "{% endfor %}{{ m.name }}{% endfor %}"
    assert rendered(source, calling(), result()).endswith("f")
    assert rendered(source, calling(id=None), result(None)).endswith("f")


def test_reasoning_goes_by_the_names_that_a_template_reads() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        source = EACH + "{{ m." + name + " }}{% endfor %}"
        said = {"role": "assistant", "content": "a", "reasoning_content": "because"}
        assert rendered(source, said) == "because"


def test_reasoning_may_be_a_part_of_the_content() -> None:
    source = EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    source += "{% if p.type == 'thinking' %}[{{ p.thinking }}]{% else %}{{ p.text }}{% endif %}"
    source += "{% endfor %}{% endif %}{% endfor %}"
    said = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    assert rendered(source, said) == "u[because]a"


def test_what_was_said_is_the_end_of_what_was_thought_where_there_is_room_for_one() -> None:
    source = EACH + "{% if m.tool_calls and m.content and m.thinking %}"
    source += (
        "{{ raise_exception('content and thinking') }}{% endif %}{{ m.thinking or m.content }}"
    )
    source += CALLS + "{% endfor %}{% endfor %}"
    written = rendered(source, calling("I look.", reasoning_content="hm"))
    assert written == 'uhm\n\nI look.f {"city": "Bonn"}'


PARTS = [{"type": "text", "text": "sky"}, {"type": "text", "text": "line"}]
ONE = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
BOTH = "{% if m.content is string %}{{ m.content }}{% else %}" + ONE + "{% endif %}"


@pytest.mark.parametrize(
    ("write", "of_parts", "of_text"),
    [
        ("{{ m.content }}", "sky\nline", "skyline"),
        (BOTH, "skyline", "skyline"),
        (ONE, "skyline", "skyline"),
    ],
)
def test_text_parts_are_given_as_the_template_reads_them(
    write: str, of_parts: str, of_text: str
) -> None:
    source = EACH + write + "{% endfor %}"
    for role in ("user", "system", "assistant"):
        assert rendered(source, {"role": role, "content": PARTS}) == "u" + of_parts
        assert rendered(source, {"role": role, "content": "skyline"}) == "u" + of_text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ('"text"', {}),
        ("[]", {}),
        ("null", {}),
        ("no json", {}),
        ('{"a": NaN}', {}),
        ('{"path": "a.txt", "text": "cut he', {"path": "a.txt", "text": "cut he"}),
        ('{"guests": 2, "ci', {"guests": 2}),
        ('{"guests": 2, "city": ', {"guests": 2}),
        ('{"a": [1, {"b": 2', {"a": [1, {"b": 2}]}),
        ('{"a": "x\\', {"a": "x\\"}),
        ('{"re": "\\d+"}', {"re": "\\d+"}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{"a": 1}}', {}),
    ],
)
def test_whatever_a_model_wrote_is_an_object_in_the_history(
    arguments: str, expected: dict[str, Any]
) -> None:
    assert object_of(arguments) == expected
    json.dumps(object_of(arguments), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a":' + "[" * 100_000, '{"a": [[['),
        ('{"a":' * 3000, '{"a": {"a": {"a"'),
        ('{"a":' + "[" * 2000 + "]" * 2000 + "}", '{"a": [[['),
    ],
)
def test_what_a_model_nested_without_end_can_be_sent_back(arguments: str, shown: str) -> None:
    template = ChatTemplate(EACH + CALLS + "{% endfor %}{% endfor %}", {})
    said = calling()
    said["tool_calls"][0]["function"]["arguments"] = arguments
    text = template.render(for_template([USER, said], template.traits, None), {})
    assert shown in text
    assert json.loads(text.removeprefix("f ")) == object_of(arguments)


@pytest.mark.parametrize("arguments", ['{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}'])
def test_what_json_or_unicode_cannot_say_is_not_sent_back(arguments: str) -> None:
    assert object_of('{"b": 1, ' + arguments[1:]) == {"b": 1}
    written = TOOL_FORMATS["hermes"].write
    assert written is not None
    assert written([("f", object_of(arguments))])


def test_the_id_of_a_result_without_its_call_is_one_that_the_template_takes() -> None:
    source = (
        EACH + CALLS + "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
        "{% endfor %}{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
        "{{ raise_exception('id') }}{% endif %}{{ m.tool_call_id }}{% endif %}{% endfor %}"
    )
    assert rendered(source, result("call_123456")) == short_id("call_123456")


def test_arguments_as_long_as_a_file_take_memory_in_proportion_to_them() -> None:
    def peak(arguments: str) -> int:
        tracemalloc.start()
        object_of(arguments)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    for tail in ("", "[", '"unfinished'):
        short, long = (json.dumps({"rows": [1] * n}) + tail for n in (5_000, 20_000))
        assert peak(long) < 8 * peak(short)
        assert peak(long) < 100 * len(long)


ONE_CALL_ONLY = (
    EACH + "{{ m.content or '' }}{% if m.tool_calls %}{% set c = m.tool_calls[0] %}"
    "<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endif %}{% endfor %}"
)


def test_several_calls_are_messages_where_a_template_shows_one_of_a_message() -> None:
    both = calling("both")
    other = {"id": "call_2", "function": {"name": "g", "arguments": "{}"}}
    both["tool_calls"].append(other)
    results = [{**result("call_2"), "content": "second"}, {**result(), "content": "first"}]
    stray = {**result("call_9"), "content": "stray"}
    text = rendered(ONE_CALL_ONLY, both, *results, stray)
    assert text == 'uboth<f {"city": "Bonn"}>first<g {}>secondstray'
    unnamed = calling(None, None)
    unnamed["tool_calls"].append({"function": {"name": "g", "arguments": "{}"}})
    alike = [{**result(None), "content": "same"}] * 2
    assert rendered(ONE_CALL_ONLY, unnamed, *alike) == 'u<f {"city": "Bonn"}>same<g {}>same'
