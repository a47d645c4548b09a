"""Chat templates with the structures of the published ones: how a family writes an answer that
thinks, speaks and calls. The texts around are our own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """`tools` and `thinks` are the formats to be found. `max_calls`: more in one message are
    refused. `has_kinds`: texts within lists and objects are told from other values."""

    template: str
    tools: str
    thinks: str | None = None
    max_calls: int = 3
    has_kinds: bool = True


def chatml(calls: str, *, before: str = "", tools: str = "", end: str = "") -> str:
    """A template of ChatML's form around what writes the calls of a message `m`."""
    return (
        "{% if tools %}<|im_start|>system\n"
        + (tools or "{% for t in tools %}{{ t | tojson }}\n{% endfor %}")
        + "<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        + before
        + "{{ m.content if m.content is string }}{% if m.tool_calls %}"
        + calls
        + "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + end + "{% endif %}"
    )


THINK = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
EACH = "{% for c in m.tool_calls %}"
ITEMS = "{% for k, v in c.function.arguments.items() %}"
DONE = "{% endfor %}"
VALUE = "{{ v if v is string else v | tojson }}"
ARGUMENTS = "{{ c.function.arguments | tojson }}"
OBJECT = '{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + "}"
COMMA = "{{ ', ' if not loop.last }}"


def listed(start: str, end: str, one: str = OBJECT) -> str:
    return f"{start}[{EACH}{one}{COMMA}{DONE}]{end}"


def tagged(parameter: str, call: str, block: tuple[str, str] = ("", "")) -> str:
    return EACH + block[0] + call.replace("…", ITEMS + parameter + DONE) + block[1] + DONE


XML = "<function={{ c.function.name }}>\n…</function>"
PARAMETER = "<parameter={{ k }}>"
INVOKE = '<invoke name="{{ c.function.name }}">\n…</invoke>\n'
DSML = (
    "<｜DSML｜parameter name=\"{{ k }}\" string=\"{{ 'true' if v is string else 'false' }}\">"
    + VALUE
    + "</｜DSML｜parameter>\n"
)
DSML_CALL = '<｜DSML｜invoke name="{{ c.function.name }}">\n…</｜DSML｜invoke>\n'
GEMMA = (
    "{%- macro write(v) -%}{%- if v is string -%}QvQ{%- elif v is boolean -%}{{ v | tojson }}"
    "{%- elif v is none -%}None{%- elif v is mapping -%}{{ '{' }}{% for k, w in v.items() %}"
    "{{ k }}:{{ write(w) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}"
    "{%- elif v is iterable -%}[{% for w in v %}{{ write(w) }}{{ ',' if not loop.last }}"
    "{% endfor %}]{%- else -%}{{ v }}{%- endif -%}{%- endmacro -%}"
).replace("QvQ", "{{ '<|\"|>' + v + '<|\"|>' }}")
NESTED = (
    "{%- set ns = ']<]minimax[>[' -%}{%- macro write(v) -%}{%- if v is mapping -%}"
    "{% for k, w in v.items() %}{{ ns }}<{{ k }}>{{ write(w) }}{{ ns }}</{{ k }}>{% endfor %}"
    "{%- elif v is string -%}{{ v }}{%- elif v is iterable -%}{% for w in v %}{{ ns }}<item>"
    "{{ write(w) }}{{ ns }}</item>{% endfor %}{%- else -%}{{ v | tojson }}{%- endif -%}"
    "{%- endmacro -%}"
)
PYTHON = (
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}="
    "{% if v is string %}QUOTED{% elif v is mapping %}{{ v | tojson }}{% else %}{{ v }}{% endif %}"
    "{{ ', ' if not loop.last }}{% endfor %})"
)
K3 = (
    "{%- macro kind(v) -%}{{ 'string' if v is string else 'boolean' if v is boolean else 'null' if "
    "v is none else 'number' if v is number else 'object' if v is mapping else 'array' }}"
    "{%- endmacro -%}"
)

FAMILIES: dict[str, Family] = {
    "Hermes, Qwen 2.5 and 3, Granite 4": Family(
        chatml(
            EACH + "\n<tool_call>\n" + OBJECT + "\n</tool_call>" + DONE,
            before=THINK,
            tools="<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>",
        ),
        "hermes",
        "think",
    ),
    "Llama 3": Family(
        "{% if tools %}{{ tools | tojson }} Respond in the format {"
        '"name": function name, "parameters": dictionary of argument name and its value}.'
        "{% endif %}"
        "{% for m in messages %}<|start|>{{ m.role }}<|end_header|>\n\n"
        "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
        "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n"
        "{% endif %}",
        "llama3_json",
        max_calls=1,
    ),
    "Mistral of 2024": Family(
        "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] ["
        "{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
        '{% endif %}{"name": "{{ c.function.name }}", "arguments": '
        + ARGUMENTS
        + ', "id": "{{ c.id }}"}'
        + COMMA
        + "{% endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }} "
        "{{ m.tool_call_id }}[/TOOL_RESULTS]{% elif m.role == 'user' %}"
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "mistral",
    ),
    "Mistral of 2025": Family(
        "{% for m in messages %}{% if m.role == 'user' %}{{ tools | tojson if tools }}[INST]"
        "{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
        "[/TOOL_RESULTS]{% else %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for b in m.content or [] %}{% if b.type == 'thinking' %}[THINK]{{ b.thinking }}[/THINK]"
        "{% else %}{{ b.text }}{% endif %}{% endfor %}{% endif %}"
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        + ARGUMENTS
        + "{% endfor %}</s>{% endif %}{% endfor %}",
        "mistral",
        "magistral",
    ),
    "Qwen3-Coder, 3.5, Nemotron 3, Step 3.5": Family(
        chatml(
            tagged(
                PARAMETER + "\n" + VALUE + "\n</parameter>\n",
                XML,
                ("\n<tool_call>\n", "\n</tool_call>"),
            ),
            before=THINK,
            end="<think>\n",
        ),
        "qwen3_coder",
        "think",
    ),
    "Seed-OSS": Family(
        chatml(
            tagged(
                PARAMETER + "{{ v }}</parameter>\n",
                XML,
                ("\n<seed:tool_call>\n", "\n</seed:tool_call>"),
            ),
            before="{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>"
            "\n{% endif %}",
        ),
        "seed_oss",
        "seed",
    ),
    "GLM 4.5": Family(
        chatml(
            tagged(
                "<arg_key>{{ k }}</arg_key>\n<arg_value>" + VALUE + "</arg_value>\n",
                "\n<tool_call>{{ c.function.name }}\n…</tool_call>",
            ),
            before=THINK,
        ),
        "glm",
        "think",
    ),
    "GLM 4.7": Family(
        chatml(
            tagged(
                "<arg_key>{{ k }}</arg_key><arg_value>" + VALUE + "</arg_value>",
                "<tool_call>{{ c.function.name }}…</tool_call>",
            ),
            before=THINK,
        ),
        "glm",
        "think",
    ),
    "Hunyuan 3": Family(
        chatml(
            "<tool_calls:x>\n"
            + tagged(
                "<arg_key:x>{{ k }}</arg_key:x>\n<arg_value:x>" + VALUE + "</arg_value:x>\n",
                "<tool_call:x>{{ c.function.name }}<tool_sep:x>\n…</tool_call:x>\n",
            )
            + "</tool_calls:x>",
            before="{% if m.role == 'assistant' %}<think:x>{{ m.reasoning_content }}</think:x>"
            "{% endif %}",
        ),
        "template",
        "template",
    ),
    "MiniMax M2": Family(
        chatml(
            "\n<minimax:tool_call>\n"
            + tagged('<parameter name="{{ k }}">' + VALUE + "</parameter>\n", INVOKE)
            + "</minimax:tool_call>",
            before=THINK,
            end="<think>\n",
        ),
        "minimax_m2",
        "think",
    ),
    "MiniMax M3": Family(
        NESTED
        + chatml(
            "{{ ns }}<tool_call>\n{% for c in m.tool_calls %}"
            '{{ ns }}<invoke name="{{ c.function.name }}">{{ write(c.function.arguments) }}{{ ns }}'
            "</invoke>\n{% endfor %}{{ ns }}</tool_call>",
            before="{% if m.reasoning_content %}<mm:think>{{ m.reasoning_content }}</mm:think>"
            "{% endif %}",
        ),
        "minimax_m3",
        "minimax_m3",
        has_kinds=False,
    ),
    "DeepSeek V3 and R1": Family(
        "{{ tools | tojson if tools }}{% for m in messages %}"
        "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content or '' }}{% if m.tool_calls %}"
        "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>{{ c.function.name }}\n```json\n"
        + ARGUMENTS
        + "\n```<｜tool▁call▁end｜>{{ '\n' if not loop.last }}{% endfor %}<｜tool▁calls▁end｜>"
        "{% endif %}<｜end▁of▁sentence｜>{% else %}<｜tool▁output｜>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"
        "{% endif %}",
        "deepseek",
    ),
    "DeepSeek V3.1": Family(
        chatml(
            "<｜tool▁calls▁begin｜>"
            + EACH
            + "<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
            + ARGUMENTS
            + "<｜tool▁call▁end｜>"
            + DONE
            + "<｜tool▁calls▁end｜>",
            end="{{ '<think>' if thinking else '</think>' }}",
        ),
        "deepseek",
        "think",
    ),
    "DeepSeek V3.2": Family(
        chatml(
            "\n\n<｜DSML｜function_calls>\n" + tagged(DSML, DSML_CALL) + "</｜DSML｜function_calls>"
        ),
        "deepseek_v32",
    ),
    "DeepSeek V4": Family(
        chatml("\n\n<｜DSML｜tool_calls>\n" + tagged(DSML, DSML_CALL) + "</｜DSML｜tool_calls>"),
        "deepseek_v32",
    ),
    "Kimi K2": Family(
        chatml(
            "<|tool_calls_section_begin|>"
            + EACH
            + "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
            + ARGUMENTS
            + "<|tool_call_end|>"
            + DONE
            + "<|tool_calls_section_end|>"
        ),
        "kimi_k2",
    ),
    "Kimi K3": Family(
        K3 + "{{ tools | tojson if tools }}{% for m in messages %}"
        '<|open|>message role="{{ m.role }}"<|sep|>'
        "{% if m.role == 'assistant' %}<|open|>think<|sep|>{{ m.reasoning_content or '' }}"
        "<|close|>think<|sep|><|open|>response<|sep|>{{ m.content or '' }}<|close|>response<|sep|>"
        "{% if m.tool_calls %}<|open|>tools<|sep|>{% for c in m.tool_calls %}"
        '<|open|>call tool="{{ c.function.name }}" index="{{ loop.index }}"<|sep|>'
        "{% for k, v in c.function.arguments.items() %}"
        '<|open|>argument key="{{ k }}" type="{{ kind(v) }}"<|sep|>'
        + VALUE
        + "<|close|>argument<|sep|>{% endfor %}<|close|>call<|sep|>{% endfor %}"
        "<|close|>tools<|sep|>{% endif %}{% else %}{{ m.content }}{% endif %}"
        "<|close|>message<|sep|>{% endfor %}"
        '{% if add_generation_prompt %}<|open|>message role="assistant"<|sep|><|open|>think<|sep|>'
        "{% endif %}",
        "kimi_k3",
        "kimi_k3",
    ),
    "Gemma 4": Family(
        GEMMA
        + chatml(
            EACH
            + "<|tool_call>call:{{ c.function.name }}{{ write(c.function.arguments) }}<tool_call|>"
            + DONE,
            before="{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}\n"
            "<channel|>{% endif %}",
        ),
        "gemma4",
        "gemma4",
    ),
    "LFM2.5": Family(
        chatml(
            "<|tool_call_start|>["
            + EACH
            + PYTHON.replace("QUOTED", "'{{ v }}'")
            + COMMA
            + DONE
            + "]<|tool_call_end|>"
        ),
        "lfm2",
    ),
    "OLMo 3, ToolACE": Family(
        chatml("[" + EACH + PYTHON.replace("QUOTED", "{{ v | tojson }}") + COMMA + DONE + "]"),
        "pythonic",
    ),
    "Cohere Command A and R7B": Family(
        chatml(
            "<|START_ACTION|>["
            + EACH
            + '\n    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.function.name }}", '
            + '"parameters": '
            + ARGUMENTS
            + "}{{ ',' if not loop.last }}"
            + DONE
            + "\n]<|END_ACTION|>",
            before="{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}"
            "<|END_THINKING|>{% endif %}",
        ),
        "cohere",
        "cohere",
    ),
    "Command R+": Family(
        chatml(
            "Action: ```json\n["
            + EACH
            + '\n    {\n        "tool_name": "{{ c.function.name }}",\n        "parameters": '
            + ARGUMENTS
            + "\n    }{{ ',' if not loop.last }}"
            + DONE
            + "\n]```"
        ),
        "command_r",
    ),
    "Granite 3": Family(chatml(listed("<|tool_call|>", "")), "granite"),
    "Nemotron Nano v2": Family(
        chatml(listed("\n<TOOLCALL>", "</TOOLCALL>\n"), before=THINK), "nemotron", "think"
    ),
    "Hunyuan A13B, Apriel, Jamba": Family(
        chatml(listed("<tool_calls>", "</tool_calls>")), "tool_calls"
    ),
    "MiniMax M1": Family(
        chatml("\n<tool_calls>\n" + EACH + OBJECT + "\n" + DONE + "</tool_calls>"), "tool_calls"
    ),
    "LongCat": Family(
        chatml(EACH + "<longcat_tool_call>\n" + OBJECT + "\n</longcat_tool_call>\n" + DONE),
        "longcat",
        "longcat",
    ),
    "InternLM": Family(
        chatml(
            EACH + "<|action_start|><|plugin|>\n" + OBJECT + "<|action_end|>" + DONE,
        ),
        "internlm",
    ),
    "Phi-4-mini": Family(
        chatml(
            "{{ '<|tool_call|>[' }}"
            + EACH
            + '{"type": "function", "function": '
            + OBJECT
            + "}"
            + COMMA
            + DONE
            + "]<|/tool_call|>"
        ),
        "granite",
    ),
    "Apertus": Family(
        chatml(
            listed(
                "<|tools_prefix|>",
                "<|tools_suffix|>",
                '{"{{ c.function.name }}": ' + ARGUMENTS + "}",
            )
        ),
        "apertus",
        "apertus",
    ),
    "functionary 3.1": Family(
        chatml(EACH + "<function={{ c.function.name }}>" + ARGUMENTS + "</function>" + DONE),
        "functionary_v31",
    ),
    "GigaChat": Family(
        chatml(EACH + "<|message_sep|>\n\nfunction call<|role_sep|>\n" + OBJECT + DONE),
        "gigachat",
    ),
    "Solar": Family(
        "{{ tools | tojson if tools }}{% for m in messages %}<|begin|>{{ m.role }}"
        "{% if m.reasoning %}<|think|>{{ m.reasoning }}"
        "<|end|><|begin|>assistant{% endif %}{% if m.tool_calls %}<|tool_calls|>"
        "{% for c in m.tool_calls %}<|tool_call:begin|>{{ c.id }}<|tool_call:name|>"
        "{{ c.function.name }}<|tool_call:args|>" + ARGUMENTS + "<|tool_call:end|>{% endfor %}"
        "<|calls|>{% else %}<|content|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant{% endif %}",
        "solar",
        "solar",
    ),
    "MiniCPM 5": Family(
        chatml(
            tagged(
                '<param name="{{ k }}">'
                "{% if v is string and ('<' in v or '\\n' in v) %}<![CDATA[{{ v }}]]>{% else %}"
                "{{ v }}{% endif %}</param>",
                '\n<function name="{{ c.function.name }}">…</function>',
            )
        ),
        "minicpm5",
    ),
    "a family that nobody knows": Family(
        chatml(EACH + "<<call>>{{ c.function.name }}<<with>>" + ARGUMENTS + "<</call>>" + DONE),
        "template",
    ),
}
