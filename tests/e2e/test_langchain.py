"""LangChain's ChatOpenAI works as it is: plain, streamed, with tools."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from tests.e2e.conftest import Nano


@pytest.fixture(scope="module")
def chat(nano: Nano) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{nano.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        model="nano",
        temperature=0,
        max_retries=0,
        max_completion_tokens=60,
    )


def test_it_answers_and_streams_the_same(chat: ChatOpenAI) -> None:
    whole = chat.invoke("What is 3 + 4?")
    chunks = list(chat.stream("What is 3 + 4?"))
    assert whole.content
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert len(chunks) > 2
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] == "stop"


async def test_many_at_once(chat: ChatOpenAI) -> None:
    answers = await chat.abatch([f"What is {i} + 4?" for i in range(5)])
    assert len({str(answer.content) for answer in answers}) > 1


def test_a_bound_tool_is_called_and_its_result_answered(chat: ChatOpenAI) -> None:
    def get_weather(city: str) -> str:
        """Get the weather of a city"""
        return f"sunny in {city}"

    tools: Any = chat.bind_tools([get_weather])
    question = ("user", "What is the weather in Madrid?")
    called = tools.invoke([question])
    [call] = called.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temperature": 21}'}
    assert "21" in tools.invoke([question, called, result]).content
    streamed = None
    for chunk in tools.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
