"""All formats by name, and the words that tell of one where a template does not write it."""

from __future__ import annotations

from collections.abc import Collection

from mlx_lm_server.parsing import reasoning
from mlx_lm_server.parsing.channels import HARMONY, ChannelFormat
from mlx_lm_server.parsing.reasoning import ReasoningFormat
from mlx_lm_server.parsing.tool_formats import families
from mlx_lm_server.parsing.tool_formats.format import ToolFormat

MUSE = ChannelFormat(
    "muse",
    tokens=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
    ends=("<|eom|>", "<|eot|>", "<|start|>"),
    self_name="self",
    calls=families.ATEM.format("atem"),
)
CHANNEL_FORMATS = {one.name: one for one in (HARMONY, MUSE)}
TOOL_FORMATS = {one.name: one for one in families.FORMATS}
REASONING_FORMATS = {one.name: one for one in reasoning.FORMATS}

# Words in a template → the channels that its answers have.
CHANNEL_SIGNS = (
    (("<|channel|>", "<|message|>"), HARMONY.name),
    (("<atem:", "<|message|>"), MUSE.name),
)
# Words in a template → its format; the first whose words are all there counts. They are asked only
# where the template does not write calls itself.
TOOL_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("]<]minimax[>[",), "minimax_m3"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<start_function_call>",), "function_gemma"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<tool_sep>", "<arg_key>"), "hunyuan"),
    (("<arg_key>",), "glm"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|tool_call_begin|>", "<|tool_call_argument_begin|>"), "kimi_k2"),
    (("<|open|>", "<|close|>", "argument key="), "kimi_k3"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>",), "deepseek"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|START_ACTION|>",), "cohere"),
    (("Action: ```json",), "command_r"),
    (("Action:", "```json", "tool_name"), "command_r"),
    (("<|tools_prefix|>",), "apertus"),
    (("<|tool_call:begin|>",), "solar"),
    (("<longcat_tool_call>",), "longcat"),
    (("<TOOLCALL>",), "nemotron"),
    (("<|action_start|>", "<|plugin|>"), "internlm"),
    (("function call<|role_sep|>",), "gigachat"),
    (("<|function_call|>", "<|message_sep|>"), "gigachat"),
    ((">>>all",), "functionary_v32"),
    (("<function=", "</function>", "{json}"), "functionary_v31"),
    (("<function=", "<|python_tag|>"), "functionary_v31"),
    (("functools",), "firefunction"),
    (("<|tool_list_start|>",), "pythonic"),
    (("List of tools: ",), "pythonic"),
    (("<|tool_call_start|>",), "pythonic"),
    (("<function_calls>",), "olmo3"),
    (("<tool_calls>",), "tool_calls"),
    (("<|tool_call|>", "<|tool|>"), "phi4_mini"),
    (("<|tool_call|>",), "granite"),
    (("<function_call>",), "granite_20b"),
    (("<param name=",), "minicpm5"),
    (("<steptml:",), "step3"),
    (('{"name": function name, "parameters"',), "llama3_json"),
    (('"parameters": dictionary of argument name and its value',), "llama3_json"),
    (("func_name1(",), "pythonic"),
    (("<|python_start|>",), "pythonic"),
    (("<tool_call>",), "hermes"),
    (("<|python_tag|>",), "llama3_json"),
)
# A token in the vocabulary → the format of a model whose template does not tell.
TOKEN_SIGNS: tuple[tuple[str, str], ...] = (
    ("<|tool_call_start|>", "pythonic"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<|START_ACTION|>", "cohere"),
    ("<|tools_prefix|>", "apertus"),
    ("<|tool_call|>", "granite"),
)
# Formats of calls → that of the reasoning of the same models, where a template has none of it.
COMPANIONS = {
    "apertus": "apertus",
    "cohere": "cohere",
    "gemma4": "gemma4",
    "kimi_k3": "kimi_k3",
    "longcat": "longcat",
    "minimax_m3": "minimax_m3",
    "seed_oss": "seed",
}


def companion_of(tools: ToolFormat) -> ReasoningFormat | None:
    """Returns how models that write such calls think, where that is told by nothing else."""
    return REASONING_FORMATS.get(COMPANIONS.get(tools.name, ""))


def channels_in(template: str) -> ChannelFormat | None:
    """Returns the channels that a template's words tell of."""
    names = (name for words, name in CHANNEL_SIGNS if all(word in template for word in words))
    name = next(names, None)
    return None if name is None else CHANNEL_FORMATS[name]


def find_tool_format(template: str, tokens: Collection[str] = ()) -> ToolFormat | None:
    """Returns the format that a template's words tell of, else special tokens."""
    for words, name in TOOL_SIGNS:
        if all(word in template for word in words):
            return TOOL_FORMATS[name]
    return next((TOOL_FORMATS[name] for token, name in TOKEN_SIGNS if token in tokens), None)


def find_reasoning_format(template: str) -> ReasoningFormat | None:
    """Returns the format whose marks stand in a template; None for those with channels."""
    for one in reasoning.FORMATS:
        if one.signs and not all(sign in template for sign in one.signs):
            continue
        if one.start.strip() in template or one.end in template:
            return one
    return None
