"""Tools, reasoning and the switches of a template, through HTTP. The fake engine says what the last
message says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.observations import observes
from tests.server.harness import VOCAB_SIZE, RunningServer, make_model

TEMPLATE = (
    "{# <tool_call> <think> #}"
    "{%- if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}|"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments | tojson }};"
    "{%- endfor -%}"
    "{%- if m.role == 'tool' %}{{ m.name }}:{% endif -%}"
    "{{ m.content }}"
    "{%- endfor -%}"
    "{%- if enable_thinking is defined and enable_thinking %}<think>{% endif -%}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Does it.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
SAID = f"<think>\nhm\n</think>\n\nLet me.\n{CALL}\n{CALL}"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_model(tmp_path_factory.mktemp("tools") / "tiny")
    server = RunningServer(folder, flags={"--chat-template": TEMPLATE}).start()
    yield server
    server.stop()


def said(server: RunningServer, text: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """Message and finish reason, put together from the stream where there is one. The prompt of
    the fake is what it says, so it is as long as the answer."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 500, **fields}
    if not stream:
        [choice] = server.client.post("/v1/chat/completions", json=body).json()["choices"]
        return {**choice["message"], "finish_reason": choice["finish_reason"]}
    found: dict[str, Any] = {"content": "", "finish_reason": None}
    calls: list[dict[str, Any]] = []
    for event in server.events("/v1/chat/completions", **body)[:-1]:
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content", "warning"):
                if delta.get(name):
                    found[name] = found.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append(
                        {
                            "id": call["id"],
                            "type": call["type"],
                            "function": {"name": call["function"]["name"], "arguments": ""},
                        }
                    )
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
    found["content"] = found["content"] or None
    return {**found, **({"tool_calls": calls} if calls else {})}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_content_and_calls_come_apart(tools: RunningServer, stream: bool) -> None:
    message = said(tools, SAID + "<eos>", stream=stream, tools=[TOOL])
    assert message["reasoning_content"] == "hm"
    # the prompt, which the fake repeats, begins with the names of the tools
    assert message["content"].startswith("f|")
    assert message["content"].endswith("Let me.")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert message["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_is_enough_without_parallel_calls(tools: RunningServer, stream: bool) -> None:
    message = said(tools, SAID + "<eos>", stream=stream, tools=[TOOL], parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1
    assert message["finish_reason"] == "tool_calls"
    tools.wait_until(tools.is_idle)


def test_arguments_come_in_pieces(start: Any) -> None:
    """The fake says a letter every 4 ms, and what a letter adds to the arguments goes out with it;
    a client that is late gets several at once, so not every one is a piece of its own."""
    server = start(flags={"--chat-template": TEMPLATE}, engine={"step_s": 0.004})
    arguments = json.dumps({"text": "one two three four five six seven eight nine ten"})
    call = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call><eos>'
    messages = [{"role": "user", "content": call}]
    body = {"messages": messages, "tools": [TOOL], "max_tokens": 300}
    events = server.events("/v1/chat/completions", **body)[:-1]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert ["id" in piece for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    texts = [piece["function"]["arguments"] for piece in pieces]
    assert "".join(texts) == arguments
    assert len(texts) > len(arguments) / 4


@pytest.mark.parametrize("text", ["a <tool_ca", "a <thin"])
@pytest.mark.parametrize("end", ["<eos>", ""])
def test_an_answer_that_ends_within_a_mark_has_it_as_text(
    tools: RunningServer, text: str, end: str
) -> None:
    """Nobody can know that it would have become one, and nothing is dropped."""
    for stream in (False, True):
        limit = {} if end else {"max_tokens": len("f|" + text)}
        message = said(tools, text + end, stream=stream, tools=[TOOL], **limit)
        assert message["content"] == "f|" + text
        assert message["finish_reason"] == ("stop" if end else "length")
        assert "warning" not in message


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_none_is_text_with_a_warning(tools: RunningServer, stream: bool) -> None:
    message = said(tools, "<tool_call>oops</tool_call><eos>", stream=stream, tools=[TOOL])
    assert message["content"] == "f|<tool_call>oops</tool_call>"
    assert "could not be parsed" in message["warning"]
    assert message["finish_reason"] == "stop"
    assert "tool_calls" not in message


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_nothing_is_a_call(tools: RunningServer, fields: dict[str, Any]) -> None:
    message = said(tools, CALL + "<eos>", stream=False, **fields)
    assert message["content"] == CALL
    assert message["finish_reason"] == "stop"


@observes("ChatMessage.name", "ChatMessage.reasoning_content", "ToolCall.type", "ToolCall.index")
@observes("Tool.type", "FunctionTool.name", "FunctionTool.description")
def test_a_template_gets_all_that_was_said(start: Any) -> None:
    template = "{{ messages | tojson }}{{ tools | tojson }}{# name #}"
    server = start(flags={"--chat-template": template, "--tool-call-parser": "hermes"})
    call = {"type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "name": "bob", "content": "u"},
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [call]},
    ]
    body = {"messages": messages, "tools": [TOOL]}
    prompt = server.client.post("/apply-template", json=body).json()["prompt"]
    seen, _, tools = prompt.partition("][")
    call["function"] = {"name": "f", "arguments": {}}  # an object, where a template takes one
    assert json.loads(seen + "]") == messages
    assert json.loads("[" + tools) == [TOOL]


@observes(
    "ChatMessage.tool_calls",
    "ToolCall.id",
    "ToolCall.function",
    "FunctionCall.name",
    "FunctionCall.arguments",
)
def test_calls_and_results_go_back_into_the_template(tools: RunningServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":2}'}}
    messages = [
        {"role": "user", "content": "u;"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    response = tools.client.post("/apply-template", json={"messages": messages})
    assert response.json() == {"prompt": 'u;f={"a": 2};f:42'}


def test_thinking_is_switched_by_the_template(tools: RunningServer) -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    message = said(tools, "deep", stream=False, max_tokens=4, **kwargs)
    assert message["reasoning_content"] == "deep"  # and the <think> that it repeats is no text
    assert message["content"] is None
    for effort, is_on in (("high", True), ("none", False)):
        body = {"messages": [{"role": "user", "content": "x"}], "reasoning_effort": effort}
        prompt = tools.client.post("/apply-template", json=body).json()["prompt"]
        assert prompt.endswith("<think>") == is_on


def test_budgets_that_disagree_are_refused(tools: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "thinking_budget": 1}
    body["thinking_token_budget"] = 2
    error = tools.client.post("/v1/chat/completions", json=body).json()["error"]
    assert "thinking_budget" in error["message"]


def test_a_budget_needs_an_end_that_is_one_token(tools: RunningServer) -> None:
    """Here the marks are text, of a token a letter."""
    body = {"messages": [{"role": "user", "content": "x"}], "thinking_budget": 1}
    error = tools.client.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("thinking_budget", "unsupported_parameter")


ALWAYS_THINKS = "{{ messages[0].content }}<think>"


@pytest.mark.parametrize(
    ("template", "effort", "is_heard"),
    [
        ("{{ messages[0].content }}", "high", False),  # agents send it to every model
        ("{{ messages[0].content }}", "none", True),
        (ALWAYS_THINKS, "low", False),
        (ALWAYS_THINKS, "none", False),  # its marks are no tokens, so they cannot be forced
    ],
)
def test_an_effort_that_a_model_has_no_measure_for_is_a_hint(
    start: Any, template: str, effort: str, is_heard: bool
) -> None:
    server = start(flags={"--chat-template": template})
    asked = {"reasoning_effort": effort, "max_tokens": 2}
    for stream in (False, True):
        response = server.chat("ab", stream=stream, **asked)
        assert response.status_code == 200
        warning = response.headers.get("x-warning")
        assert (warning is None) == is_heard
    assert warning is None or "reasoning_effort" in warning
    body = {"messages": [{"role": "user", "content": "x"}], "reasoning_effort": effort}
    response = server.client.post("/apply-template", json=body)
    assert ("x-warning" not in response.headers) == is_heard


def test_no_effort_ends_reasoning_that_the_template_begins(start: Any, tmp_path: Path) -> None:
    record = tmp_path / "seen.json"
    folder = with_tokens(tmp_path / "model", "<think>", "</think>")
    server = start(
        model=folder,
        flags={"--chat-template": ALWAYS_THINKS},
        engine={"vocab_size": 300, "record_sampling": record},
    )
    response = server.chat("ab", max_tokens=2, reasoning_effort="none")
    assert "x-warning" not in response.headers
    start_id, end_id = VOCAB_SIZE, VOCAB_SIZE + 1
    seen = json.loads(record.read_text())["thinking"]
    assert seen == [0, [start_id], [end_id], [end_id], True]


def test_usage_counts_the_tokens_of_the_reasoning(tools: RunningServer) -> None:
    text = "<think>ab</think>c"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": len(text)}
    usage = tools.client.post("/v1/chat/completions", json=body).json()["usage"]
    details = usage["completion_tokens_details"]
    assert usage["completion_tokens"] == len(text)
    # one letter is one token: from the last of the first tag to the last of the second
    assert details == {"reasoning_tokens": len(">ab</think>")}


def test_the_sdk_puts_a_streamed_call_together(tools: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{tools.url}/v1", api_key="none", max_retries=0)
    with sdk.chat.completions.stream(
        model="default",
        messages=[{"role": "user", "content": SAID + "<eos>"}],
        tools=[TOOL],  # type: ignore[list-item]
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert message.tool_calls is not None
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1}] * 2  # type: ignore[union-attr]


@observes("ModelConfig.tool_call_parser", "ModelConfig.reasoning_parser")
@pytest.mark.parametrize(
    ("flag", "text", "content"),
    [
        ("--tool-call-parser=none", f"{CALL}", f"f|{CALL}"),
        ("--tool-call-parser=mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', "f|"),
        ("--reasoning-parser=none", "<think>x</think>y", "f|<think>x</think>y"),
        ("--reasoning-parser=magistral", "[THINK]x[/THINK]y", "f|y"),
        ("--tool-call-parser=harmony", "<|channel|>final<|message|>y", "f|y"),
    ],
)
def test_a_flag_names_the_format(start: Any, flag: str, text: str, content: str) -> None:
    name, _, value = flag.partition("=")
    server = start(flags={"--chat-template": TEMPLATE, name: value})
    message = said(server, text + "<eos>", stream=False, tools=[TOOL])
    assert message["content"] == content


def strict_tool(**schema: Any) -> dict[str, Any]:
    properties = {"a": {"type": "integer", **schema}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    function = {"name": "f", "strict": True, "parameters": parameters}
    return {"type": "function", "function": function}


@observes("FunctionTool.strict", "FunctionTool.parameters", "Tool.function")
@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_call_fits_its_schema_or_is_text(tools: RunningServer, stream: bool) -> None:
    fits = said(tools, CALL + "<eos>", stream=stream, tools=[strict_tool()])
    assert fits["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    wrong = said(tools, CALL + "<eos>", stream=stream, tools=[strict_tool(type="string")])
    assert "tool_calls" not in wrong
    assert wrong["content"] == "f|" + CALL
    assert "arguments.a must be of type string" in wrong["warning"]


def test_a_strict_schema_that_cannot_be_checked_is_refused_by_name(tools: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [strict_tool(pattern="x")]}
    error = tools.client.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "pattern" in error["message"]


def with_tokens(folder: Path, *names: str) -> Path:
    """A model whose tokenizer has these special tokens too."""
    make_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_markers_that_are_special_tokens_are_still_read(start: Any, tmp_path: Path) -> None:
    names = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    folder = with_tokens(tmp_path / "model", *names)
    server = start(model=folder, flags={"--chat-template": TEMPLATE}, engine={"vocab_size": 300})
    message = said(server, SAID + "<eos>", stream=True, tools=[TOOL])
    assert message["reasoning_content"] == "hm"
    assert len(message["tool_calls"]) == 2
