"""A small OpenAI-like server on loopback. The model that is asked for says how it behaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from mlx_lm_server.bench.client import Target

TOKENS_PER_WORD = 2
OVERHEAD_TOKENS = 3
CACHED_TOKENS = 5
OTHER = "/other"  # what is below it passes for a second server


class FakeServer:
    """Counts two tokens per word and three more, so a calibration has something to find."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.num_disconnects = 0
        self.wants_a_model = False

    def target(self, model: str | None = None) -> Target:
        return Target(self.url, model)

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        if self.wants_a_model and "model" not in body:
            return JSONResponse({"error": {"message": "model is missing"}}, status_code=400)
        if body.get("model") == "refuses":
            error = {"message": "no such model", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, status_code=404)
        if body.get("model") == "breaks":
            return PlainTextResponse("oh no", status_code=500)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "listed"}, {"id": "other"}]})

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model, num_tokens = body.get("model"), body["max_tokens"]
        yield ": a comment\r\n\r\n"
        if "messages" in body:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        try:
            for index in range(num_tokens - 1 if model == "shortens" else num_tokens):
                yield event({"choices": [piece(body, f" w{index}")]})
                await asyncio.sleep(3600 if model == "stalls" and index == 2 else 0.001)
                if model == "fails" and index == 1:
                    yield event({"error": {"message": "engine died"}})
                    return
                if model == "truncates" and index == 1:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.num_disconnects += 1
            raise
        yield event({"choices": [{**piece(body, ""), "finish_reason": "length"}]})
        if model != "counts-nothing":
            yield event({"choices": [], "usage": usage(body)})
        yield "data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def piece(body: dict[str, Any], text: str) -> dict[str, Any]:
    return {"delta": {"content": text}} if "messages" in body else {"text": text}


def usage(body: dict[str, Any]) -> dict[str, Any]:
    text = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
    return {
        "prompt_tokens": TOKENS_PER_WORD * len(text.split()) + OVERHEAD_TOKENS,
        "completion_tokens": body["max_tokens"] - (body.get("model") == "shortens"),
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
