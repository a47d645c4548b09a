"""What clients ask of a model beyond text, on the bundled model, through the official SDK."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Nano

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Madrid?"}]
SUM: Any = [{"role": "user", "content": "What is 3 + 4?"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def sdk(nano: Nano) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)


def test_it_thinks_when_asked_to(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(
        model="nano", messages=SUM, temperature=0, extra_body=THINK, max_tokens=200
    )
    message = whole.choices[0].message
    reasoning = (message.model_extra or {})["reasoning_content"]
    assert reasoning
    assert message.content
    assert "think>" not in reasoning + message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert (whole.usage.completion_tokens_details.reasoning_tokens or 0) > 0
    stream = sdk.chat.completions.create(
        model="nano", messages=SUM, temperature=0, extra_body=THINK, max_tokens=200, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas) == reasoning
    assert "".join(d.content or "" for d in deltas) == message.content
    plain = sdk.chat.completions.create(model="nano", messages=SUM, temperature=0, max_tokens=200)
    assert "reasoning_content" not in (plain.choices[0].message.model_extra or {})


@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("temperature", [0, 1])
def test_it_answers_when_its_budget_is_spent(
    sdk: openai.OpenAI, budget: int, temperature: float
) -> None:
    answer = sdk.chat.completions.create(
        model="nano",
        messages=SUM,
        temperature=temperature,
        seed=1,
        max_tokens=100,
        logprobs=True,
        extra_body={**THINK, "thinking_budget": budget},
    )
    message = answer.choices[0].message
    tokens = [token.token for token in answer.choices[0].logprobs.content or ()]  # type: ignore[union-attr]
    start = tokens.index("<think>") + 1 if "<think>" in tokens else 0
    assert tokens[start:].index("</think>") == budget
    assert message.content
    assert "think>" not in message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    marks = 1 + (start > 0)
    assert answer.usage.completion_tokens_details.reasoning_tokens == budget + marks


def test_a_tool_is_called_and_its_result_is_answered(sdk: openai.OpenAI) -> None:
    """The loop that every agent runs."""
    messages = list(QUESTION)
    first = sdk.chat.completions.create(
        model="nano", messages=messages, tools=[TOOL], temperature=0, max_tokens=100
    )
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    result = json.dumps({"temperature": 21, "condition": "sunny"})
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ]
    second = sdk.chat.completions.create(
        model="nano", messages=messages, tools=[TOOL], temperature=0, max_tokens=100
    )
    assert second.choices[0].finish_reason == "stop"
    assert "21" in (second.choices[0].message.content or "")


def test_streamed_arguments_add_up_to_the_call(sdk: openai.OpenAI) -> None:
    function = {**TOOL["function"], "strict": False}
    stream = sdk.chat.completions.create(
        model="nano",
        messages=QUESTION,
        tools=[{**TOOL, "function": function}],  # type: ignore[list-item]
        temperature=0,
        max_tokens=100,
        stream=True,
    )
    pieces = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
    assert [piece.id is not None for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    text = "".join(p.function.arguments or "" for p in pieces if p.function is not None)
    assert set(json.loads(text)) == {"city"}


def arguments_of(call: Any) -> Any:
    return json.loads(call.function.arguments)


async def test_the_async_helper_reads_a_strict_call(nano: Nano) -> None:
    client = openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)
    async with client:
        whole = await client.chat.completions.create(
            model="nano", messages=QUESTION, tools=[TOOL], temperature=0, max_tokens=100
        )
        async with client.chat.completions.stream(
            model="nano", messages=QUESTION, tools=[TOOL], temperature=0, max_tokens=100
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    expected, found = (one.choices[0].message.tool_calls for one in (whole, final))
    assert expected is not None
    assert found is not None
    assert [arguments_of(call) for call in found] == [arguments_of(call) for call in expected]


def test_logprobs_are_the_same_streamed_and_their_bytes_are_the_text(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "messages": SUM, "temperature": 0, "max_tokens": 20}
    whole = sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert whole.choices[0].logprobs is not None
    tokens = whole.choices[0].logprobs.content or []
    text = b"".join(bytes(token.bytes or []) for token in tokens)
    assert text.decode() == whole.choices[0].message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    stream = sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    streamed = [t for c in choices if c.logprobs for t in c.logprobs.content or []]
    assert [t.token for t in streamed] == [t.token for t in tokens]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def test_choice_i_is_what_the_seed_plus_i_gives_alone(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "prompt": "Tell me", "temperature": 1.3, "max_tokens": 12}
    together = sdk.completions.create(**asked, n=4, seed=40)
    alone = [sdk.completions.create(**asked, seed=40 + i).choices[0].text for i in range(4)]
    assert [choice.text for choice in together.choices] == alone
    assert len(set(alone)) > 1
    assert together.usage is not None
    assert together.usage.completion_tokens <= 48


def test_a_prompt_is_scored_as_evaluations_do(sdk: openai.OpenAI) -> None:
    """lm-eval's local-completions: the text alone, with its logprobs, and nothing generated."""
    text = "One two three four five"
    scored = sdk.completions.create(
        model="nano", prompt=[text, "Hello there"], max_tokens=0, echo=True, logprobs=1
    )
    first = scored.choices[0]
    assert first.text == text
    assert first.logprobs is not None
    assert "".join(first.logprobs.tokens or []) == text
    scores = first.logprobs.token_logprobs or []
    assert scores[0] is None
    assert all(score <= 0 for score in scores[1:])
    again = sdk.completions.create(
        model="nano", prompt=text, max_tokens=4, temperature=0, echo=True, logprobs=1
    )
    assert again.choices[0].logprobs is not None
    known = (again.choices[0].logprobs.token_logprobs or [])[1 : len(scores)]
    assert known == pytest.approx(scores[1:], abs=1e-3)
    assert len(again.choices[0].logprobs.tokens or []) == len(scores) + 4


def test_an_answer_can_be_made_longer(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "messages": SUM, "temperature": 0, "max_tokens": 60}
    usual = sdk.chat.completions.create(**asked).usage
    longer = sdk.chat.completions.create(**asked, extra_body={"min_tokens": 40}).usage
    endless = sdk.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert usual is not None
    assert longer is not None
    assert endless.usage is not None
    assert usual.completion_tokens < 40 <= longer.completion_tokens
    assert endless.usage.completion_tokens == 60
    assert endless.choices[0].finish_reason == "length"
