"""The ways in which the served model thinks and calls tools, and which of them a request uses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.parsing import format_finding, formats
from mlx_lm_server.parsing.channels import HARMONY, ChannelFormat
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats.format import ToolFormat
from mlx_lm_server.parsing.tool_schemas import ToolSchemas
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.template_traits import WrittenCalls

# Arguments that show how a template writes values, and plain ones for templates that change those.
HARD = {
    "probe_text": "one\n\"two\" 'three' \\four\\n\tend\n",
    "probe_count": 3,
    "probe_flag": True,
    "probe_list": ["it's", "x"],
    "probe_number": "5",
}
PLAIN = {"probe_first": "alpha words", "probe_second": "omega words"}
NAMES = ("probe_call", "probe_more")


@dataclass(frozen=True)
class ModelFormats:
    """`channels` read whole answers of their own kind. `leaves_calls`: the user wants calls to stay
    in the text."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    channels: ChannelFormat | None = None
    leaves_calls: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, template: ChatTemplate | str, tokens: Collection[str] = ()
    ) -> ModelFormats:
        """Returns the formats that the flags name, else those that the chat template writes, else
        those that its words or the special `tokens` of the vocabulary tell of."""
        if isinstance(template, str):
            template = ChatTemplate(template, {})
        calls_by, thinks_by = config.tool_call_parser, config.reasoning_parser
        channels = formats.CHANNEL_FORMATS.get(calls_by) or formats.CHANNEL_FORMATS.get(thinks_by)
        if channels is None and "auto" in (calls_by, thinks_by):
            channels = _channels(template)
        if channels is not None and {calls_by, thinks_by} <= {"auto", channels.name}:
            return cls(channels=channels)
        reasoning = formats.REASONING_FORMATS.get(thinks_by)
        if thinks_by == "auto":
            reasoning = _reasoning(template)
        tools = formats.TOOL_FORMATS.get(calls_by)
        if calls_by == "auto":
            tools = _tools(template, reasoning, tokens)
        if thinks_by == "auto" and reasoning is None and tools is not None:
            reasoning = formats.companion_of(tools)
        return cls(reasoning, tools, None, leaves_calls=calls_by == "none")

    @property
    def is_harmony(self) -> bool:
        return self.channels is HARMONY

    @property
    def can_think(self) -> bool:
        return self.reasoning is not None or self.channels is not None

    @property
    def can_call(self) -> bool:
        """Tells whether calls of tools are read, or left where they are on purpose."""
        return self.tools is not None or self.channels is not None or self.leaves_calls

    def markers(self) -> tuple[str, ...]:
        """Returns all texts of which special tokens of this model may be a part."""
        if self.channels is not None:
            more = self.channels.calls.marks if self.channels.calls is not None else ()
            return (*self.channels.tokens, *more)
        marks = self.reasoning.marks if self.reasoning is not None else ()
        return (*marks, *(self.tools.marks if self.tools is not None else ()))

    def answer(
        self,
        prompt: str,
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        continues: bool = False,
    ) -> AnswerFormat | None:
        """Returns how to read the answer to a rendered prompt, which may be one that `continues` a
        message; None where it is text only."""
        if self.channels is not None:
            schemas = ToolSchemas(tools or (), are_all=True)
            head = self.channels.open_head(prompt) if continues else ""
            return AnswerFormat(channels=self.channels, schemas=schemas, head=head)
        if self.reasoning is None and (not tools or self.tools is None):
            return None
        calls = self.tools if tools else None
        return AnswerFormat(
            reasoning=self.reasoning,
            tools=calls,
            is_open=self.reasoning is not None
            and self.reasoning.is_open_after(prompt, continues=continues),
            is_calling=calls is not None and calls.is_open_after(prompt),
            schemas=ToolSchemas(tools) if tools else None,
        )


def _channels(template: ChatTemplate) -> ChannelFormat | None:
    if formats.channels_in(template.source) is None:
        return None
    for written in _probes(template, PLAIN):
        found = format_finding.channels_of(written.texts, written.calls, written.tools)
        if found is not None:
            return found
    return formats.channels_in(template.source)


def _reasoning(template: ChatTemplate) -> ReasoningFormat | None:
    found = formats.find_reasoning_format(template.source)
    if found is not None and found.signs:
        return found
    thought = template.traits.thought()
    shown = format_finding.reasoning_format_of(*thought) if thought is not None else None
    return shown or found


def _tools(
    template: ChatTemplate, thinks: ReasoningFormat | None, tokens: Collection[str]
) -> ToolFormat | None:
    for arguments in (HARD, PLAIN):
        for written in _probes(template, arguments):
            found = format_finding.tool_format_of(
                written.texts, written.calls, written.tools, thinks, derives=arguments is PLAIN
            )
            if found is not None:
                return found
    return formats.find_tool_format(template.source, tokens)


def _probes(template: ChatTemplate, arguments: Mapping[str, Any]) -> Iterator[WrittenCalls]:
    """Yields what a template writes for two calls, or for one where it refuses two."""
    calls = [(name, arguments) for name in NAMES]
    for some in (calls, calls[:1]):
        written = template.traits.written(some)
        if written is not None:
            yield written
