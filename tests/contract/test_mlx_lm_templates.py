"""Chat templates that mlx-lm keeps as code, which the server cannot import, are here as jinja and
give the same."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import chat_templates
from mlx_lm.chat_templates import deepseek_v32

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.template_files import OURS, find_templates

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Größe", "parameters": {"type": "object"}},
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": 'Hi "you" {there}'}
CALLS = {
    "role": "assistant",
    "content": "Let me.",
    "reasoning_content": "hm",
    "tool_calls": [
        {"id": str(i), "type": "function", "function": {"name": "f", "arguments": arguments}}
        for i, arguments in enumerate(({"a": "x<y", "b": [1, None], "c": True}, {}))
    ],
}
RESULTS = [{"role": "tool", "tool_call_id": str(i), "content": f"r{i}"} for i in range(2)]
THOUGHT = {"role": "assistant", "content": "Yes.", "reasoning_content": "easy"}
CONVERSATIONS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, THOUGHT, USER],
    "calls": [SYSTEM, USER, CALLS],
    "one result": [SYSTEM, USER, CALLS, RESULTS[0]],
    "results": [SYSTEM, USER, CALLS, *RESULTS],
    "after results": [SYSTEM, USER, CALLS, *RESULTS, THOUGHT, USER],
    "twice": [SYSTEM, USER, CALLS, *RESULTS, CALLS, *RESULTS],
    "nothing asked": [SYSTEM],
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("model")
    source = find_templates(folder, {"chat_template_type": "deepseek_v32"}, None).get("default")
    assert source is not None
    return ChatTemplate(source, {})


def for_mlx_lm(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """It takes arguments as text, and changes what it is given."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in copied:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copied


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinks", [True, False, None])
@pytest.mark.parametrize("has_tools", [True, False])
def test_deepseek_v32(ours: ChatTemplate, name: str, thinks: bool | None, has_tools: bool) -> None:
    messages = CONVERSATIONS[name]
    tools = [TOOL, TOOL] if has_tools and SYSTEM in messages else None
    variables = {} if thinks is None else {"enable_thinking": thinks}
    expected = deepseek_v32.apply_chat_template(
        for_mlx_lm(messages), add_generation_prompt=True, tools=tools, **variables
    )
    assert ours.render(messages, variables, tools) == expected


def test_without_a_generation_prompt(ours: ChatTemplate) -> None:
    for messages in ([USER], [USER, THOUGHT]):
        expected = deepseek_v32.apply_chat_template(for_mlx_lm(messages))
        assert ours.render(messages, {}, add_generation_prompt=False) == expected


def test_tools_without_a_system_message_are_not_dropped(ours: ChatTemplate) -> None:
    empty = {"role": "system", "content": ""}
    with_empty = deepseek_v32.apply_chat_template(
        [empty, USER], tools=[TOOL], add_generation_prompt=True
    )
    assert ours.render([USER], {}, [TOOL]) == with_empty


def test_the_formats_are_found_in_it(ours: ChatTemplate) -> None:
    formats = ModelFormats.of(ModelConfig(), ours)
    assert formats.tools == TOOL_FORMATS["deepseek_v32"]
    assert formats.reasoning == REASONING_FORMATS["think"]
    assert ours.traits.calls.takes_objects


def test_mlx_lm_keeps_no_other_template_as_code() -> None:
    [folder] = chat_templates.__path__
    as_code = {
        module.name
        for module in pkgutil.iter_modules([folder])
        if "def apply_chat_template" in (Path(folder) / f"{module.name}.py").read_text()
    }
    assert as_code == {file.stem for file in OURS.glob("*.jinja")}
