"""Renders conversations as the bundled chat template does, but in parts with their loss weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .exchange import Exchange, Message

NO_THOUGHT = "<think>\n\n</think>\n\n"
TOOLS_HEAD = "# Tools\n\nYou may call these tools:\n<tools>"
TOOLS_TAIL = (
    "\n</tools>\n\nTo call one, answer with:\n<tool_call>\n"
    '{"name": <name>, "arguments": <arguments>}\n</tool_call>'
)
AFTER_TOOL_THOUGHT = "The tool has answered."


@dataclass(frozen=True)
class Part:
    """A piece of rendered text. `skip_first`: its first token carries no loss."""

    text: str
    is_target: bool = False
    skip_first: bool = False


@dataclass(frozen=True)
class Style:
    """How a conversation is rendered.

    `as_generated`: every assistant turn has the prefix it was generated with; otherwise only the
    last has it, as in a real request, and history is bare.
    """

    thinking: bool = False
    as_generated: bool = False


def system_part(system: str, tools: tuple[dict[str, Any], ...]) -> Part | None:
    """The system turn, or None where there is nothing to say."""
    if not system and not tools:
        return None
    listed = "".join("\n" + json.dumps(tool) for tool in tools)
    block = TOOLS_HEAD + listed + TOOLS_TAIL if tools else ""
    joint = "\n\n" if system and tools else ""
    return Part(f"<|im_start|>system\n{system}{joint}{block}<|im_end|>\n")


def conversation_parts(
    exchanges: list[Exchange], system: str, tools: tuple[dict[str, Any], ...], style: Style
) -> Iterator[list[Part]]:
    """One list of parts per exchange; the system turn belongs to the first."""
    head = system_part(system, tools)
    for i, exchange in enumerate(exchanges):
        is_last = i == len(exchanges) - 1
        parts = list(_exchange_parts(exchange, is_last, style))
        yield [head, *parts] if head and i == 0 else parts


def _exchange_parts(exchange: Exchange, is_last: bool, style: Style) -> Iterator[Part]:
    after_tool = False
    last = len(exchange.messages) - 1
    for i, message in enumerate(exchange.messages):
        if message["role"] == "user":
            yield Part(f"<|im_start|>user\n{message['content']}<|im_end|>\n")
        elif message["role"] == "tool":
            after_tool = True
            body = f"<tool_response>\n{message['content']}\n</tool_response>"
            yield Part(f"<|im_start|>user\n{body}<|im_end|>\n")
        else:
            thought = AFTER_TOOL_THOUGHT if after_tool else exchange.thought
            yield from _assistant_parts(message, thought, is_last, is_last and i == last, style)


def _assistant_parts(
    message: Message, thought: str, in_last_exchange: bool, is_end: bool, style: Style
) -> Iterator[Part]:
    yield Part("<|im_start|>assistant\n")
    body = assistant_text(message) + "<|im_end|>"
    if style.thinking and (in_last_exchange or style.as_generated):
        yield Part(f"<think>\n{thought}\n</think>\n\n{body}", is_target=True)
    elif not style.thinking and (is_end or style.as_generated):
        yield Part(NO_THOUGHT)
        yield Part(body, is_target=True)
    else:
        yield Part(body, is_target=True, skip_first=True)
    yield Part("\n")


def assistant_text(message: Message) -> str:
    """Content and tool calls as the model writes them."""
    calls = [_call_text(call["function"]) for call in message.get("tool_calls", ())]
    content = [message["content"]] if message["content"] else []
    return "\n".join(content + calls)


def _call_text(function: dict[str, Any]) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
