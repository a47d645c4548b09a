"""What a template writes for calls is read back as the same calls, and what the server answered
comes back in a request, with every family's template."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.family_templates import FAMILIES, Family

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing.message_parser import MessageParser
from mlx_lm_server.server.answers.generate_request import Answer, Delta
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.history import for_template
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.protocols.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.protocols.openai.schema import parse_chat

NAMES = ("write_file", "get_weather")
KEYS = ("path", "text", "count", "flag", "items", "where")
MARKS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "</parameter>", "<parameter=text>"),
    *("</function>", "<function=write_file>", "</arg_value>", "<arg_key>", "</invoke>", "]]"),
    *("<parameter name=", "<｜DSML｜invoke name=", "<|tool_call_end|>", "[TOOL_CALLS]", "[ARGS]"),
    *("```", "<|end|>", "<tool_call|>", ")]", "')", "</seed:tool_call>", "}}", "{%", "</param>"),
)
WORDS = st.sampled_from(("word", "5", "true", "null", "None", "über", "🥊", "a b", "x=1", "it's"))
BITS = st.sampled_from(("\n", "\t", '"', "'", "\\", "\\n", "\\\\", ",", ":", "(", "{", "<", ">"))


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Texts with what formats give a meaning to, also at their ends; a mark of a format stands
    between words, since two in the order of the format would be the format."""
    middle = draw(st.lists(WORDS | BITS, max_size=4).map("".join))
    if draw(st.booleans()):
        middle = f"{middle}w{draw(st.sampled_from(MARKS))}w{draw(WORDS)}"
    return (
        draw(st.sampled_from(("", "\n", "\n\n", " ")))
        + middle
        + draw(st.sampled_from(("", "\n", "\n\n", " ", "\\", '"')))
    )


PLAIN = (
    st.none() | st.booleans() | st.integers(-999, 10**9) | st.floats(-9, 9).map(lambda x: x + 0.0)
)
VALUES = {
    "path": texts(),
    "text": texts(),
    "count": st.integers(-(10**12), 10**12),
    "flag": st.booleans(),
    "items": st.lists(PLAIN.filter(lambda v: v is not None) | WORDS, min_size=1, max_size=3),
    "where": st.dictionaries(
        st.sampled_from(("a", "b_c")), st.booleans() | st.integers() | WORDS, min_size=1
    ),
}
KINDS = {"count": "integer", "flag": "boolean", "items": "array", "where": "object"}


def tool(name: str) -> dict[str, Any]:
    properties: dict[str, Any] = {k: {"type": KINDS.get(k, "string")} for k in KEYS}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool(name) for name in NAMES]
ARGUMENTS = st.lists(st.sampled_from(KEYS), unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: VALUES[key] for key in keys})
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
USER = {"role": "user", "content": "Do it."}


@cache
def model_of(name: str) -> Any:
    template = ChatTemplate(FAMILIES[name].template, {"bos_token": "<s>"})
    tokenizer = SimpleNamespace(template=template)

    async def render_chat(messages: Any, variables: Any, tools: Any = None, **more: Any) -> str:
        return template.render(messages, variables, tools, **more)

    tokenizer.render_chat = render_chat
    formats = ModelFormats.of(ModelConfig(), template)
    return SimpleNamespace(tokenizer=tokenizer, formats=formats, thinking=None)


def written(name: str, calls: list[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    """The prompt, and what the model would have written after it."""
    model, template = model_of(name), model_of(name).tokenizer.template
    said = [
        {"id": f"call_{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(calls)
    ]
    messages = [USER, {"role": "assistant", "tool_calls": said}]
    for_it = for_template(messages, template.traits, model.formats.tools)
    text = template.render(for_it, {}, TOOLS, add_generation_prompt=False)
    prompt = template.render([USER], {}, TOOLS)
    begin = template.render([USER], {}, TOOLS, add_generation_prompt=False)
    return prompt, text[len(prompt if text.startswith(prompt) else begin) :]


def test_every_family_is_found_by_what_its_template_writes() -> None:
    for name, family in FAMILIES.items():
        formats = model_of(name).formats
        thinks = formats.reasoning.name if formats.reasoning is not None else None
        assert (name, formats.tools.name, thinks) == (name, family.tools, family.thinks)


@pytest.mark.parametrize("name", FAMILIES)
@given(calls=CALLS, data=st.data())
def test_what_a_template_writes_of_calls_is_read_back(
    name: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    family: Family = FAMILIES[name]
    calls = calls[: family.max_calls]
    if not family.has_kinds:
        calls = [(n, {k: v for k, v in a.items() if isinstance(v, str | int)}) for n, a in calls]
    _, text = written(name, calls)
    answer = model_of(name).formats.answer("", TOOLS)
    cut = data.draw(st.integers(0, len(text)))
    for pieces in ([text], [text[:cut], text[cut:]]):
        read = said_by(answer, pieces)
        assert [(n, json.loads(a)) for _, n, a in read.calls] == calls
        assert read.warnings == []


def said_by(answer: Any, pieces: list[str], *, is_cut: bool = False) -> Answer:
    parser, said = MessageParser(answer), Answer()
    for delta in [*map(parser.push, pieces), parser.flush(is_cut=is_cut)]:
        content, delta.content = delta.content, ""
        said.add(Delta(0, content, message=delta))
    said.add(Delta(0, "", "stop"))
    return said


def as_message(answer: Answer) -> dict[str, Any]:
    """Returns the message as a client's SDK gives it back."""
    is_empty = not answer.text and bool(answer.calls or answer.reasoning)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if is_empty else answer.text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in answer.calls
        ],
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.warnings:
        message["warning"] = "; ".join(answer.warnings)
    return message


ENDS = st.integers(0, 400)


@pytest.mark.parametrize("name", FAMILIES)
@given(
    calls=CALLS,
    thought=st.sampled_from(("", "hm", "a\nb")),
    content=st.sampled_from(("", "I look.", "x < y")),
    end=ENDS,
)
def test_an_answer_that_is_sent_back_is_taken(
    name: str,
    calls: list[tuple[str, dict[str, Any]]],
    thought: str,
    content: str,
    end: int,
) -> None:
    model, family = model_of(name), FAMILIES[name]
    formats: ModelFormats = model.formats
    _, text = written(name, calls[: family.max_calls])
    if formats.reasoning is not None and thought:
        text = f"{formats.reasoning.start}{thought}{formats.reasoning.end}{content}{text}"
    text = text[: len(text) - end] if end % 2 else text  # half of them are cut
    message = as_message(said_by(formats.answer("", TOOLS), [text], is_cut=bool(end % 2)))
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "ok"}
        for call in message["tool_calls"]
    ]
    body = {"messages": [USER, message, *results, USER], "tools": TOOLS}
    request = parse_chat(body)
    prompt = chat_prompt(model, request.messages, None, tools=request.tools)
    rendered = asyncio.run(prompt.render(model))
    if not end % 2:
        assert len(message["tool_calls"]) == len(calls[: family.max_calls])
    for call in message["tool_calls"]:
        assert call["function"]["name"] in rendered
