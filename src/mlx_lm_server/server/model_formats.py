"""How the served model thinks and calls tools, and what of it one request makes use of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing import formats, harmony
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas


@dataclass(frozen=True)
class ModelFormats:
    """`leaves_calls`: the user wants calls to stay in the text."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    is_harmony: bool = False
    leaves_calls: bool = False

    @classmethod
    def of(cls, config: ModelConfig, template: str) -> ModelFormats:
        """As the flags name them, else as the chat template shows them."""
        tools = formats.TOOL_FORMATS.get(config.tool_call_parser)
        if config.tool_call_parser == "auto":
            tools = formats.find_tool_format(template)
        reasoning = formats.REASONING_FORMATS.get(config.reasoning_parser)
        if config.reasoning_parser == "auto":
            reasoning = formats.find_reasoning_format(template)
        is_harmony = harmony.NAME in (config.reasoning_parser, tools.name if tools else None)
        return cls(reasoning, tools, is_harmony, leaves_calls=config.tool_call_parser == "none")

    @property
    def can_think(self) -> bool:
        return self.reasoning is not None or self.is_harmony

    def markers(self) -> tuple[str, ...]:
        """All texts that special tokens of this model may stand for."""
        if self.is_harmony:
            return harmony.TOKENS
        found: tuple[str, ...] = ()
        if self.reasoning is not None:
            found += (self.reasoning.start, self.reasoning.end, *self.reasoning.dropped)
        return found + (self.tools.tokens if self.tools is not None else ())

    def answer(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> AnswerFormat | None:
        """How to read the answer to a rendered prompt; None where it is text only."""
        if self.is_harmony:
            return AnswerFormat(is_harmony=True, schemas=ToolSchemas(tools or ()))
        if self.reasoning is None and (not tools or self.tools is None):
            return None
        return AnswerFormat(
            reasoning=self.reasoning,
            tools=self.tools if tools else None,
            is_open=self.reasoning is not None and self.reasoning.is_open_after(prompt),
            schemas=ToolSchemas(tools) if tools else None,
        )
