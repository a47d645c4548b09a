"""Chat completions, as the official client and the wire see them."""

from __future__ import annotations

import openai
import pytest

from tests.observations import observes
from tests.server.harness import RunningServer


@pytest.fixture(scope="module")
def sdk(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_is_what_the_engine_said(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="tiny", messages=ask("hello"), max_tokens=6)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    # The fake repeats the prompt, which begins with a special token: that has no text.
    assert choice.message.content == "hello"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 6)
    assert answer.usage.total_tokens == 13
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


@observes("StreamOptions.include_usage")
def test_a_stream_gives_role_then_text_then_reason_then_usage(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="tiny",
            messages=ask("hello"),
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    first, *texts, finish, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == "hello"
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *texts))
    assert finish.choices[0].finish_reason == "length"
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_usage(server: RunningServer) -> None:
    events = server.events("/v1/chat/completions", messages=ask("hi"), max_tokens=3)
    assert events[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1])


def test_streamed_and_whole_answers_are_the_same(server: RunningServer) -> None:
    text = "Zwölf Boxkämpfer 🥊 jagen 東京 über den Sylter Deich"
    whole = server.chat(text, max_tokens=60).json()["choices"][0]["message"]["content"]
    events = server.events("/v1/chat/completions", messages=ask(text), max_tokens=60)
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == whole
    assert text.startswith(whole[:20])


def test_a_character_of_several_tokens_comes_in_one_piece(server: RunningServer) -> None:
    events = server.events("/v1/chat/completions", messages=ask("🥊é"), max_tokens=7)
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == "🥊é"
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_that_the_limit_cuts_becomes_a_replacement(server: RunningServer) -> None:
    content = server.chat("🥊", max_tokens=3).json()["choices"][0]["message"]["content"]
    assert content == "\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: RunningServer, stream: bool) -> None:
    fields = {"messages": ask("one two three"), "stop": ["o th", "zzz"], "max_tokens": 50}
    if stream:
        events = server.events("/v1/chat/completions", **fields)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        reason = events[-2]["choices"][0]["finish_reason"]
    else:
        [choice] = server.client.post("/v1/chat/completions", json=fields).json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("one tw", "stop")
    server.wait_until(server.is_idle)


def test_usage_counts_up_to_the_token_that_completes_a_stop_string(server: RunningServer) -> None:
    answer = server.chat("one two", stop="e", max_tokens=50).json()
    assert answer["usage"]["completion_tokens"] == 4  # <user> o n e


def test_the_models_end_token_ends_the_answer_and_has_no_text(server: RunningServer) -> None:
    answer = server.chat("a<eos>b", max_tokens=50).json()
    assert answer["choices"][0]["message"]["content"] == "a"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


def test_a_stop_token_id_ends_the_answer_and_has_no_text(server: RunningServer) -> None:
    token_b = server.complete("b", max_tokens=1)
    assert token_b.json()["choices"][0]["text"] == "b"
    alphabet = "!" + "".join(chr(c) for c in range(ord('"'), ord("~") + 1))
    answer = server.chat("abc", stop_token_ids=[alphabet.index("b")], max_tokens=50).json()
    assert answer["choices"][0]["message"]["content"] == "a"
    assert answer["choices"][0]["finish_reason"] == "stop"


@observes("ChatMessage.content", "TextPart.text", "TextPart.type")
def test_text_parts_are_joined_by_newlines(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "ab\ncd"


@observes("ChatMessage.role", "ChatMessage.tool_call_id")
def test_all_roles_reach_the_template(server: RunningServer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u", "name": "bob"},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "max_tokens": 10}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "sduat"


def test_a_template_that_raises_is_a_400_with_its_message(server: RunningServer) -> None:
    body = {"messages": [{"role": "tool", "content": "t"}]}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "tool messages need an id" in response.json()["error"]["message"]


def test_chat_template_kwargs_reach_the_template(server: RunningServer) -> None:
    answer = server.chat("x", chat_template_kwargs={"prefix": "P"}, max_tokens=3).json()
    assert answer["choices"][0]["message"]["content"] == "Px"


def test_chat_template_kwargs_cannot_replace_the_messages(server: RunningServer) -> None:
    response = server.chat("x", chat_template_kwargs={"messages": []})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "chat_template_kwargs.messages"


def test_max_completion_tokens_is_the_newer_name(server: RunningServer) -> None:
    answer = server.chat("hello", max_completion_tokens=2).json()
    assert answer["usage"]["completion_tokens"] == 2


def test_null_is_the_same_as_absent(server: RunningServer) -> None:
    names = (
        *("temperature", "top_p", "stop", "seed", "logit_bias", "user", "max_completion_tokens"),
        *("stream", "stream_options", "tools", "tool_choice", "n", "logprobs", "response_format"),
    )
    assert server.chat("x", max_tokens=2, **dict.fromkeys(names)).status_code == 200


def test_values_that_change_nothing_are_accepted(server: RunningServer) -> None:
    response = server.chat(
        "x",
        max_tokens=2,
        n=1,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        store=False,
        metadata={},
        user="somebody",
        priority=3,
    )
    assert response.status_code == 200, response.text


def test_without_max_tokens_an_answer_may_fill_the_context(server: RunningServer) -> None:
    answer = server.chat("x" * 4000, stop_token_ids=None).json()
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 4002
    assert usage["total_tokens"] == 4096


@pytest.mark.parametrize("name", ["tiny", "other", "default", None])
def test_the_model_goes_by_each_of_its_names(server: RunningServer, name: str | None) -> None:
    fields = {} if name is None else {"model": name}
    answer = server.chat("x", max_tokens=1, **fields).json()
    assert answer["model"] == ("other" if name == "other" else "tiny")


def test_the_model_goes_by_its_path(server: RunningServer) -> None:
    assert server.chat("x", max_tokens=1, model=str(server.model)).status_code == 200


def test_models_are_listed_and_found(sdk: openai.OpenAI) -> None:
    assert [card.id for card in sdk.models.list()] == ["tiny", "other"]
    card = sdk.models.retrieve("other")
    assert (card.id, card.object) == ("other", "model")
    assert card.model_extra is not None
    assert card.model_extra["max_model_len"] == 4096


def test_an_unknown_model_is_the_sdks_not_found_error(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model="gpt-9", messages=ask("x"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gpt-9")


async def test_thirty_two_clients_of_the_sdk_at_once(server: RunningServer) -> None:
    import asyncio

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    async def one(i: int) -> str:
        text = f"client {i} says this"
        stream = await client.chat.completions.create(
            model="tiny", messages=ask(text), max_tokens=len(text) + 1, stream=True
        )
        parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(parts) == text
        return text

    async with client:
        assert len(set(await asyncio.gather(*map(one, range(32))))) == 32
    server.wait_until(server.is_idle)


def test_every_response_has_a_request_id(server: RunningServer) -> None:
    assert len(server.client.get("/livez").headers["x-request-id"]) == 32
    given = server.client.get("/livez", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    refused = server.client.post("/v1/chat/completions", content=b"{")
    assert refused.headers["x-request-id"]
