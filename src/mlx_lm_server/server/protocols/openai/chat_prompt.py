"""A chat request → what the model's template renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.parsing.strict_schema import unknown_keyword
from mlx_lm_server.server.models.history import for_template
from mlx_lm_server.server.models.served_model import ServedModel
from mlx_lm_server.server.models.thinking_switches import thinking_of
from mlx_lm_server.server.protocols.openai.schema import ChatMessage, Tool

# Where a message that is to be continued ends; no conversation holds it.
HERE = "\x01continue here\x01"


@dataclass(frozen=True)
class ChatPrompt:
    """Input of a template; `tools` None where the answer may call none. `ends_thinking`: what the
    template cannot switch off is ended at once. `warnings` say what has no effect. `continues`: the
    prompt ends within the last message."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    tools: list[dict[str, Any]] | None
    ends_thinking: bool = False
    warnings: tuple[str, ...] = ()
    continues: bool = False

    async def render(self, model: ServedModel, *, add_generation_prompt: bool = True) -> str:
        """Returns the prompt; a template that refuses tools gets them with the fields that were
        left out. Raises InvalidRequestError where it refuses the messages."""
        try:
            return await self._rendered(model, add_generation_prompt)
        except InvalidRequestError:
            tools = [_complete(tool) for tool in self.tools or ()]
            if tools == (self.tools or []):
                raise
        return await replace(self, tools=tools)._rendered(model, add_generation_prompt)

    async def _rendered(self, model: ServedModel, add_generation_prompt: bool) -> str:
        messages = _with_mark(self.messages) if self.continues else self.messages
        text = await model.tokenizer.render_chat(
            messages,
            self.variables,
            self.tools,
            add_generation_prompt=add_generation_prompt and not self.continues,
        )
        return _up_to_mark(text) if self.continues else text


def chat_prompt(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    variables: Mapping[str, Any] | None,
    *,
    effort: str | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    continues: bool = False,
) -> ChatPrompt:
    """Returns what the template is to render. Raises InvalidRequestError for what it cannot do."""
    template = model.tokenizer.template
    thinking = thinking_of(
        variables or {},
        effort,
        template,
        can_think=model.formats.can_think,
        can_be_ended=model.thinking is not None,
    )
    given = [message.said() for message in messages]
    return ChatPrompt(
        for_template(given, template.traits, model.formats.tools),
        thinking.variables,
        _tools(tools, tool_choice, model),
        thinking.ends,
        thinking.warnings,
        continues,
    )


def _complete(tool: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool with all fields that templates read without asking."""
    function = tool["function"]
    schema = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    given = schema["properties"] if isinstance(schema["properties"], dict) else {}
    properties = {
        name: {"description": "", **one} if isinstance(one, dict) else one
        for name, one in given.items()
    }
    schema = {**schema, "properties": properties, "required": schema.get("required") or []}
    return {**tool, "function": {"description": "", **function, "parameters": schema}}


def _with_mark(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Marks the end of the last message, so that it can be found in what is rendered."""
    *before, last = messages
    content = last.get("content") or ""
    if isinstance(content, list):
        text = content[-1] if content and content[-1].get("type") == "text" else None
        kept = content[:-1] if text is not None else content
        marked: Any = [*kept, {"type": "text", "text": (text or {}).get("text", "") + HERE}]
    else:
        marked = content + HERE
    return [*before, {**last, "content": marked}]


def _up_to_mark(text: str) -> str:
    """Raises InvalidRequestError where the template does not write the end of the message."""
    place = text.rfind(HERE)
    if place < 0:
        raise InvalidRequestError(
            "the model's chat template does not write the last message as it is, so that it cannot "
            "be continued",
            param="continue_final_message",
        )
    return text[:place]


def _tools(
    tools: Sequence[Tool] | None,
    choice: str | Mapping[str, Any] | None,
    model: ServedModel,
) -> list[dict[str, Any]] | None:
    _check_choice(choice, tools)
    if not tools or choice == "none":
        return None
    for tool in tools:
        if tool.function.strict and (word := unknown_keyword(tool.function.parameters)):
            raise _unsupported("tools", f"`{word}` in the schema of a strict tool is not checked:")
    if not model.tokenizer.template.reads("tools"):
        raise _unsupported("tools", "the model's chat template has no tools:")
    if not model.formats.can_call:
        raise _unsupported("tools", "how this model writes calls is unknown (--tool-call-parser):")
    return [tool.model_dump(exclude_none=True) for tool in tools]


def _check_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Tool] | None) -> None:
    if choice in (None, "none"):
        return
    if not tools:
        raise InvalidRequestError(
            "tool_choice: only allowed when `tools` are given",
            param="tool_choice",
            code="invalid_value",
        )
    if choice == "auto":
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
