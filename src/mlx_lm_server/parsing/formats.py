"""Which format a model uses: read from its chat template, or named by the user."""

from __future__ import annotations

from mlx_lm_server.parsing import harmony, reasoning
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats import json_formats, literal_formats, tag_formats
from mlx_lm_server.parsing.tool_formats.format import ToolFormat

# Read with the whole answer by harmony.py, which knows its reasoning too.
HARMONY = ToolFormat(harmony.NAME, json_formats.FORMATS[0].read, tokens=harmony.TOKENS)

TOOL_FORMATS = {
    tool_format.name: tool_format
    for tool_format in (
        *json_formats.FORMATS,
        *tag_formats.FORMATS,
        *literal_formats.FORMATS,
        HARMONY,
    )
}
REASONING_FORMATS = {one.name: one for one in reasoning.FORMATS}

# Words in a template → its format; the first whose words are all there counts.
TOOL_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), harmony.NAME),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<start_function_call>",), "function_gemma"),
    (("<arg_key>",), "glm"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>",), "deepseek"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_list_start|>",), "pythonic"),
    (("<|tool_call_start|>",), "pythonic"),
    (("<|python_start|>",), "pythonic"),
    (("<tool_call>",), "hermes"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters": dictionary of argument name and its value',), "llama3_json"),
)


def find_tool_format(template: str) -> ToolFormat | None:
    for words, name in TOOL_SIGNS:
        if all(word in template for word in words):
            return TOOL_FORMATS[name]
    return None


def find_reasoning_format(template: str) -> ReasoningFormat | None:
    """None where the template says nothing, and for Harmony, which has its own."""
    for one in reasoning.FORMATS:
        if one.start.strip() in template or one.end in template:
            return one
    return None
