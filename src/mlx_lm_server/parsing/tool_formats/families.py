"""The formats of the families of models, each as one of a few ways to write calls.

Which templates and parsers were read for them stands in docs/reference/formats.md.
"""

from __future__ import annotations

from mlx_lm_server.parsing.tool_formats import named_calls
from mlx_lm_server.parsing.tool_formats.code_calls import GemmaCalls, PythonCalls
from mlx_lm_server.parsing.tool_formats.format import ToolFormat
from mlx_lm_server.parsing.tool_formats.json_calls import JsonCalls
from mlx_lm_server.parsing.tool_formats.literals import Dialect
from mlx_lm_server.parsing.tool_formats.nested_tags import MINIMAX_M3
from mlx_lm_server.parsing.tool_formats.tag_calls import Tag, TagCalls

HERMES = JsonCalls(("<tool_call>",), ("</tool_call>",))
LLAMA = JsonCalls(
    ("<|python_tag|>",),
    bare=("{",),
    likely=('{"name"', '{"type": "function"', '{"type":"function"'),
    dropped=("<|python_start|>", "<|python_end|>"),
    argument_key="parameters",
)
# Hunyuan, Apriel, Jamba, MiniMax M1
TOOL_CALLS = JsonCalls(("<tool_calls>",), ("</tool_calls>",), is_list=True)
GRANITE = JsonCalls(
    ("<|tool_call|>", "<tool_call>"), ("<|/tool_call|>", "</tool_call>"), is_list=True
)
PHI = JsonCalls(
    ("<|tool_call|>",), ("<|/tool_call|>",), bare=("[{",), likely=("functools[",), is_list=True
)
FIREFUNCTION = JsonCalls(bare=("[{",), likely=("functools[",), is_list=True)
NEMOTRON = JsonCalls(("<TOOLCALL>",), ("</TOOLCALL>",), is_list=True)
LONGCAT = JsonCalls(("<longcat_tool_call>",), ("</longcat_tool_call>",))
INTERNLM = JsonCalls(
    ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"),
    ("<|action_end|>",),
    argument_key="parameters",
)
GRANITE_20B = JsonCalls(("<function_call>",))
XLAM = JsonCalls(("[TOOL_CALLS]", "<tool_call>"), ("</tool_call>",), bare=("[{", "[\n", "```json"))
COHERE = JsonCalls(
    ("<|START_ACTION|>",),
    ("<|END_ACTION|>",),
    name_key="tool_name",
    argument_key="parameters",
    is_list=True,
)
COMMAND_R = JsonCalls(
    ("Action: ```json", "Action:```json"),
    ("```",),
    name_key="tool_name",
    argument_key="parameters",
    is_list=True,
)
GIGACHAT = JsonCalls(
    (
        "<|message_sep|>\n\nfunction call<|role_sep|>\n",
        "function call<|role_sep|>\n",
        "<|function_call|>",
    )
)

QWEN_CODER = TagCalls(
    Tag("<function=", ">", "</function>"),
    Tag("<parameter=", ">", "</parameter>"),
    blocks=(("<tool_call>", "</tool_call>"),),
    pads=True,
    is_block_optional=True,
)
SEED = TagCalls(
    Tag("<function=", ">", "</function>"),
    Tag("<parameter=", ">", "</parameter>"),
    blocks=(("<seed:tool_call>", "</seed:tool_call>"),),
    is_block_optional=True,
)
GLM = TagCalls(
    Tag("<tool_call>", "", "</tool_call>"),
    Tag("<arg_key>", "</arg_key>", "</arg_value>"),
    value_open="<arg_value>",
    separator="<tool_sep>",
)
HUNYUAN = TagCalls(
    Tag("<tool_call>", "", "</tool_call>"),
    Tag("<arg_key>", "</arg_key>", "</arg_value>"),
    blocks=(("<tool_calls>", "</tool_calls>"),),
    value_open="<arg_value>",
    separator="<tool_sep>",
    is_block_optional=True,
)
MINIMAX_M2 = TagCalls(
    Tag("<invoke name=", ">", "</invoke>"),
    Tag("<parameter name=", ">", "</parameter>"),
    blocks=(("<minimax:tool_call>", "</minimax:tool_call>"),),
    is_block_optional=True,
)
DSML = TagCalls(
    Tag("<｜DSML｜invoke name=", ">", "</｜DSML｜invoke>"),
    Tag("<｜DSML｜parameter name=", ">", "</｜DSML｜parameter>"),
    blocks=(
        ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        ("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    ),
    is_block_optional=True,
    tokens=("｜DSML｜",),
)
KIMI_K3 = TagCalls(
    Tag("<|open|>call tool=", "<|sep|>", "<|close|>call<|sep|>"),
    Tag("<|open|>argument key=", "<|sep|>", "<|close|>argument<|sep|>"),
    blocks=(("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),),
    has_entities=True,
    tokens=("<|open|>", "<|close|>", "<|sep|>"),
)
MINICPM5 = TagCalls(
    Tag("<function name=", ">", "</function>"),
    Tag("<param name=", ">", "</param>"),
    has_cdata=True,
)
ATEM = TagCalls(
    Tag("<atem:invoke name=", ">", "</atem:invoke>"),
    Tag("<atem:parameter name=", ">", "</atem:parameter>"),
    blocks=(("<atem:function_calls>", "</atem:function_calls>"),),
    is_block_optional=True,
)
STEP3 = TagCalls(
    Tag("<steptml:invoke name=", ">", "</steptml:invoke>"),
    Tag("<steptml:parameter name=", ">", "</steptml:parameter>"),
    blocks=(
        (
            "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>",
            "<｜tool_call_end｜>",
        ),
        ("<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"),
    ),
    tokens=("<｜tool_calls_end｜>",),
)

PYTHON_MARKS = (
    ("<|tool_call_start|>", "<|python_start|>"),
    ("<|tool_call_end|>", "<|python_end|>"),
)
PYTHONIC = PythonCalls(*PYTHON_MARKS)
RAW_PYTHONIC = PythonCalls(*PYTHON_MARKS, dialect=Dialect(is_raw=True))
OLMO = PythonCalls(("<function_calls>",), ("</function_calls>",), bare=())

FORMATS: tuple[ToolFormat, ...] = (
    HERMES.format("hermes"),
    QWEN_CODER.format("qwen3_coder"),
    GLM.format("glm"),
    MINIMAX_M2.format("minimax_m2"),
    MINIMAX_M3.format("minimax_m3"),
    DSML.format("deepseek_v32"),
    *named_calls.FORMATS,
    KIMI_K3.format("kimi_k3"),
    SEED.format("seed_oss"),
    COHERE.format("cohere"),
    COMMAND_R.format("command_r"),
    GRANITE.format("granite"),
    GRANITE_20B.format("granite_20b"),
    NEMOTRON.format("nemotron"),
    TOOL_CALLS.format("tool_calls"),
    HUNYUAN.format("hunyuan"),
    LONGCAT.format("longcat"),
    INTERNLM.format("internlm"),
    XLAM.format("xlam"),
    PHI.format("phi4_mini"),
    FIREFUNCTION.format("firefunction"),
    GIGACHAT.format("gigachat"),
    MINICPM5.format("minicpm5"),
    STEP3.format("step3"),
    PYTHONIC.format("pythonic"),
    RAW_PYTHONIC.format("lfm2"),
    OLMO.format("olmo3"),
    GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>').format("gemma4"),
    LLAMA.format("llama3_json"),
    GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>").format("function_gemma"),
)
