from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.protocols.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.protocols.openai.schema import parse_chat

# Reads all fields of a tool, whether they are there or not.
SOURCE = (
    "{% for tool in tools or [] %}{% set f = tool.function %}"
    "{% if f.name == 'refused' %}{{ raise_exception('no such name') }}{% endif %}"
    "{{ f.name + ':' + f.description }}"
    "{% for name, one in f.parameters.properties.items() %} {{ name + one.description }}"
    "{% endfor %};{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}"
)
NUM_RENDERED: list[int] = []


def prompt_of(parameters: Any, **function: Any) -> str:
    template = ChatTemplate(SOURCE, {})

    async def render_chat(messages: Any, variables: Any, tools: Any = None, **more: Any) -> str:
        NUM_RENDERED.append(1)
        return template.render(messages, variables, tools, **more)

    tokenizer = SimpleNamespace(template=template, render_chat=render_chat)
    formats = ModelFormats.of(ModelConfig(), template)
    model: Any = SimpleNamespace(tokenizer=tokenizer, formats=formats, thinking=None)
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, **function}}
    request = parse_chat({"messages": [{"role": "user", "content": "u"}], "tools": [tool]})
    prompt = chat_prompt(model, request.messages, None, tools=request.tools)
    return asyncio.run(prompt.render(model))


@pytest.mark.parametrize("properties", [None, [], "x", {}])
def test_a_tool_whose_properties_are_none_is_rendered_without(properties: Any) -> None:
    assert prompt_of({"type": "object", "properties": properties}) == "f:;u"


def test_fields_that_a_template_misses_are_filled_in() -> None:
    assert prompt_of(None) == "f:;u"
    assert prompt_of({"properties": {"a": {}, "b": {"description": "!"}}}) == "f: a b!;u"


def test_a_complete_tool_is_rendered_once() -> None:
    NUM_RENDERED.clear()
    prompt_of({"properties": {"a": {"description": "?"}}}, description="does")
    assert len(NUM_RENDERED) == 1


def test_what_is_refused_for_another_reason_is_refused() -> None:
    NUM_RENDERED.clear()
    with pytest.raises(InvalidRequestError, match="no such name"):
        prompt_of({"properties": {"a": {}}}, name="refused")
    assert len(NUM_RENDERED) == 2
