"""The endpoints of the OpenAI API."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_lm_server.server.answers.generate_request import GenerateRequest, Usage
from mlx_lm_server.server.engines.generation import Generation
from mlx_lm_server.server.http.endpoint import ANY_GENERATION, ANY_REQUEST, Endpoint
from mlx_lm_server.server.http.request_body import parsed_body
from mlx_lm_server.server.protocols.openai import adapter, answer_schema, schema
from mlx_lm_server.server.protocols.openai.stream import (
    ChatChunks,
    CompletionChunks,
    Head,
    chat_response,
    completion_response,
)
from mlx_lm_server.server.protocols.sse import EventStream, collect
from mlx_lm_server.server.services import Services

log = logging.getLogger(__name__)

GROUP = "OpenAI"
# So many scored tokens take a few milliseconds to write down.
MAX_INLINE_TOKENS = 1024


class OpenAIRoutes:
    """Stateless; everything it needs is in the services."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST",
                "/v1/chat/completions",
                self.chat,
                "Answer a conversation",
                GROUP,
                schema.ChatRequest,
                answer_schema.ChatCompletion,
                answer_schema.ChatCompletionChunk,
                errors=ANY_GENERATION,
            ),
            Endpoint(
                "POST",
                "/v1/completions",
                self.completions,
                "Go on with a text",
                GROUP,
                schema.CompletionRequest,
                answer_schema.Completion,
                answer_schema.Completion,
                errors=ANY_GENERATION,
            ),
            Endpoint(
                "GET",
                "/v1/models",
                self.models,
                "Names of the served model",
                GROUP,
                answer=answer_schema.ModelList,
                errors=ANY_REQUEST,
            ),
            Endpoint(
                "GET",
                "/v1/models/{id:path}",
                self.model,
                "The model behind a name",
                GROUP,
                answer=answer_schema.ModelCard,
                errors=(*ANY_REQUEST, 404),
            ),
        ]

    async def chat(self, http: Request) -> ASGIApp:
        request = await parsed_body(http, schema.parse_chat)
        model = await self._services.model_with(request.chat_template)
        return await self._answer(
            http,
            request,
            num_sequences=request.num_choices,
            adapt=lambda key: adapter.from_chat(request, model, key),
            id="chatcmpl-" + secrets.token_hex(16),
        )

    async def completions(self, http: Request) -> ASGIApp:
        request = await parsed_body(http, schema.parse_completion)
        model = self._services.model()
        return await self._answer(
            http,
            request,
            num_sequences=len(request.prompt) * request.num_choices,
            adapt=lambda key: adapter.from_completion(request, model, key),
            id="cmpl-" + secrets.token_hex(16),
        )

    async def _answer(
        self,
        http: Request,
        request: schema.Sampling,
        *,
        num_sequences: int,
        adapt: Callable[[str], Awaitable[list[GenerateRequest]]],
        id: str,
    ) -> ASGIApp:
        """Answers a request of either endpoint: admission, adapter, engine, response."""
        services = self._services
        arrival_s: float = http.scope["state"]["arrival_s"]
        name = services.model().names.resolve(request.model)
        with services.admission.preparing(num_sequences):
            sequences = await adapt(http.scope["state"]["client_key"])
            generation = services.generate(id, sequences, arrival_s)
        http.scope["state"]["warnings"] = sequences[0].warnings
        log.debug(
            "%s: %d sequences, user=%s, safety_identifier=%s",
            *(id, num_sequences, request.user, request.safety_identifier),
        )
        is_chat = isinstance(request, schema.ChatRequest)
        head = Head(id, int(time.time()), name, request.metadata)
        tokenizer = services.model().tokenizer
        if request.stream:
            kind = ChatChunks if is_chat else CompletionChunks
            return EventStream(
                generation,
                kind(head, tokenizer, include_usage=request.wants_usage),
                keep_alive_s=services.config.generation.keep_alive_s,
                usage=lambda: self._usage(generation, request),
            )
        answers = await collect(generation, http.receive, num_sequences)
        usage = self._usage(generation, request)
        build = chat_response if is_chat else completion_response
        num_scored = sum(len(a.tokens or ()) + len(a.prompt_tokens or ()) for a in answers)
        if num_scored <= MAX_INLINE_TOKENS:
            return json_response(build(head, answers, usage, tokenizer))
        return json_response(await asyncio.to_thread(build, head, answers, usage, tokenizer))

    def _usage(self, generation: Generation, request: schema.Sampling) -> Usage:
        usage = generation.usage()
        if request.timings:
            usage.timings = generation.timings()
        if request.explain_cache:
            usage.cache = self._services.explain(generation.cache_facts)
        return usage

    async def models(self, http: Request) -> Response:
        cards = [self._card(name) for name in self._services.names.shown]
        return json_response(msgspec.json.encode({"object": "list", "data": cards}))

    async def model(self, http: Request) -> Response:
        name = self._services.names.resolve(http.path_params["id"])
        return json_response(msgspec.json.encode(self._card(name)))

    def _card(self, name: str) -> dict[str, Any]:
        services = self._services
        return {
            "id": name,
            "object": "model",
            "created": services.created_s,
            "owned_by": "mlx-lm-server",
            "root": services.config.model.model,
            "max_model_len": services.served_tokens,
        }


def json_response(body: bytes) -> Response:
    return Response(body, media_type="application/json")
