"""What takes long is done on a thread, so that the streams go on meanwhile."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from tokenizers.decoders import ByteLevel

from mlx_lm_server.server.http.request_body import parsed_body
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.tokenizer import Tokenizer


class Backend:
    """As much of a tokenizer as is asked of it; notes which threads ask."""

    decoder = ByteLevel()

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def _note(self) -> None:
        self.threads.add(threading.current_thread())

    def get_vocab_size(self, with_added_tokens: bool) -> int:
        return 1000

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def token_to_id(self, token: str) -> None:
        return None

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        self._note()
        return [SimpleNamespace(ids=[1] * len(text)) for text in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self._note()
        return "x" * len(ids)

    def decode_batch(self, sequences: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def id_to_token(self, token_id: int) -> str:
        self._note()
        return "x"

    def render(self, **_: Any) -> str:
        self._note()
        return "x"


def tokenizer(backend: Backend) -> Tokenizer:
    template = ChatTemplate("{{ messages }}", {})
    template._default = backend  # type: ignore[assignment]
    return Tokenizer(backend, template, frozenset())


async def work(name: str, one: Tokenizer, size: int) -> None:
    match name:
        case "encode":
            await one.encode("x" * size, add_special_tokens=False)
        case "decode":
            assert await one.decode([1] * size) == "x" * size
        case "tokens":
            assert await one.tokens_of([1] * size) == ["x"] * size
        case "text":
            await one.render_chat([{"role": "user", "content": "x" * size}], {})
        case "turns":
            await one.render_chat([{"role": "user", "content": "x"}] * (size // 50), {})
        case "tools":
            await one.render_chat([], {}, [{}] * (size // 50))


@pytest.mark.parametrize("name", ["encode", "decode", "tokens", "text", "turns", "tools"])
async def test_long_texts_and_conversations_are_done_on_a_thread(name: str) -> None:
    backend = Backend()
    one = tokenizer(backend)
    backend.threads.clear()
    await work(name, one, 100)
    assert backend.threads == {threading.main_thread()}, "a short one is not worth a thread"
    backend.threads.clear()
    await work(name, one, 100_000)
    assert backend.threads
    assert threading.main_thread() not in backend.threads


@pytest.mark.parametrize(("size", "is_main"), [(10, True), (100_000, False)])
async def test_a_long_body_is_parsed_on_a_thread(size: int, is_main: bool) -> None:
    body = json.dumps({"prompt": "x" * size}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    def parse(value: dict[str, Any]) -> bool:
        assert len(value["prompt"]) == size
        return threading.current_thread() is threading.main_thread()

    assert await parsed_body(Request({"type": "http"}, receive), parse) == is_main
