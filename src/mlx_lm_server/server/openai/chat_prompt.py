"""A chat request → what the model's template renders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.parsing.strict_schema import unknown_keyword
from mlx_lm_server.server.chat_template import ChatTemplate
from mlx_lm_server.server.openai.schema import ChatMessage, Tool
from mlx_lm_server.server.served_model import ServedModel

NO_EFFORT = "reasoning_effort has no effect on this model"


@dataclass(frozen=True)
class ChatPrompt:
    """Input of a template; `tools` None where the answer may call none. `ends_thinking`: what the
    template cannot switch off is ended at once. `warnings` say what has no effect."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    tools: list[dict[str, Any]] | None
    ends_thinking: bool = False
    warnings: tuple[str, ...] = ()

    async def render(self, model: ServedModel, *, add_generation_prompt: bool = True) -> str:
        return await model.tokenizer.render_chat(
            self.messages,
            self.variables,
            self.tools,
            add_generation_prompt=add_generation_prompt,
        )


def chat_prompt(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    variables: Mapping[str, Any] | None,
    *,
    effort: str | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Raises InvalidRequestError for what the model's template cannot do."""
    template = model.tokenizer.template
    by_effort = {} if effort is None else _variables_of_effort(effort, template, model)
    is_deaf = effort is not None and not by_effort and (effort != "none" or model.formats.can_think)
    ends_thinking = is_deaf and effort == "none" and model.thinking is not None
    return ChatPrompt(
        _for_template(messages, template),
        _variables({**by_effort, **(variables or {})}, template, model),
        _tools(tools, tool_choice, template, model),
        ends_thinking,
        (NO_EFFORT,) if is_deaf and not ends_thinking else (),
    )


def _for_template(messages: Sequence[ChatMessage], template: ChatTemplate) -> list[dict[str, Any]]:
    """What a template sees: only what was given, `developer` by its older name, and tool messages
    with the name of what was called."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        fields: dict[str, Any] = message.model_dump(exclude_none=True)
        if message.role == "developer":
            fields["role"] = "system"
        if message.tool_calls:
            fields.setdefault("content", "")
            names |= {c.id: c.function.name for c in message.tool_calls if c.id is not None}
            if template.takes_argument_objects:
                _parse_arguments(fields["tool_calls"])
        if message.tool_call_id in names:
            fields.setdefault("name", names[message.tool_call_id])
        if message.reasoning_content and template.reads("message.thinking"):
            fields["thinking"] = message.reasoning_content
        found.append(fields)
    return found


def _parse_arguments(calls: list[dict[str, Any]]) -> None:
    """Arguments that are no JSON, which a model may once have written, stay as they are."""
    for call in calls:
        function = call["function"]
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError:
            continue


def _variables(
    variables: dict[str, Any], template: ChatTemplate, model: ServedModel
) -> dict[str, Any]:
    if "enable_thinking" in variables and not template.reads("enable_thinking"):
        variables |= _other_switch(bool(variables.pop("enable_thinking")), template, model)
    for name in variables:
        if not template.reads(name):
            raise InvalidRequestError(
                f"the model's chat template has no variable `{name}`",
                param=f"chat_template_kwargs.{name}",
            )
    return variables


def _other_switch(thinks: bool, template: ChatTemplate, model: ServedModel) -> dict[str, bool]:
    if not model.formats.is_harmony and template.reads("thinking"):
        return {"thinking": thinks}
    if thinks == model.formats.can_think:
        return {}  # it cannot do otherwise
    raise InvalidRequestError(
        f"this model {'does not think' if thinks else 'always thinks'}: its chat template has no "
        "variable `enable_thinking`",
        param="chat_template_kwargs.enable_thinking",
        code="unsupported_parameter",
    )


def _variables_of_effort(effort: str, template: ChatTemplate, model: ServedModel) -> dict[str, Any]:
    """Empty where the template has none for it."""
    found: dict[str, Any] = {}
    if template.reads("reasoning_effort"):
        found["reasoning_effort"] = effort
    if template.reads("enable_thinking"):
        found["enable_thinking"] = effort != "none"
    if not found and not model.formats.is_harmony and template.reads("thinking"):
        found["thinking"] = effort != "none"
    return found


def _tools(
    tools: Sequence[Tool] | None,
    choice: str | Mapping[str, Any] | None,
    template: ChatTemplate,
    model: ServedModel,
) -> list[dict[str, Any]] | None:
    _check_choice(choice)
    if not tools or choice == "none":
        return None
    for tool in tools:
        if tool.function.strict and (word := unknown_keyword(tool.function.parameters)):
            raise _unsupported("tools", f"`{word}` in the schema of a strict tool is not checked:")
    if not template.reads("tools"):
        raise _unsupported("tools", "the model's chat template has no tools:")
    formats = model.formats
    if formats.tools is None and not formats.is_harmony and not formats.leaves_calls:
        raise _unsupported("tools", "how this model writes calls is unknown (--tool-call-parser):")
    return [tool.model_dump(exclude_none=True) for tool in tools]


def _check_choice(choice: str | Mapping[str, Any] | None) -> None:
    if choice in (None, "auto", "none"):
        return
    if choice == "required" or isinstance(choice, Mapping):
        raise _unsupported("tool_choice", "a call that is required needs a grammar, and")
    raise InvalidRequestError(
        "tool_choice: must be `auto` or `none`", param="tool_choice", code="invalid_value"
    )


def _unsupported(param: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{reason} `{param}` is not supported by this server",
        param=param,
        code="unsupported_parameter",
    )
