"""What a model's tokenizer and template do, as endpoints of their own: vLLM's and llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlx_lm_server.server.http.endpoint import ANY_REQUEST, Endpoint
from mlx_lm_server.server.http.request_body import parsed_body
from mlx_lm_server.server.models.served_model import ServedModel
from mlx_lm_server.server.models.tokenizer import MAX_INLINE_TOKENS, Tokenizer
from mlx_lm_server.server.protocols.openai import answer_schema, text_schema
from mlx_lm_server.server.protocols.openai.adapter import check_ids
from mlx_lm_server.server.protocols.openai.chat_prompt import chat_prompt
from mlx_lm_server.server.services import Services

GROUP = "Text"
ERRORS = (*ANY_REQUEST, 404, 503)


class TextRoutes:
    """Stateless; nothing here reaches the engine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST",
                "/tokenize",
                self.tokenize,
                "Token ids of a text or a conversation",
                GROUP,
                text_schema.TokenizeRequest,
                answer_schema.TokenizeAnswer,
                errors=ERRORS,
            ),
            Endpoint(
                "POST",
                "/detokenize",
                self.detokenize,
                "The text of token ids",
                GROUP,
                text_schema.DetokenizeRequest,
                answer_schema.DetokenizeAnswer,
                errors=ERRORS,
            ),
            Endpoint(
                "POST",
                "/apply-template",
                self.apply_template,
                "A conversation as the model gets it",
                GROUP,
                text_schema.ApplyTemplateRequest,
                answer_schema.ApplyTemplateAnswer,
                errors=ERRORS,
            ),
        ]

    async def tokenize(self, http: Request) -> Response:
        request = await parsed_body(http, text_schema.parse_tokenize)
        model = await self._model(request.model, request.chat_template)
        text = request.text
        if request.messages is not None:
            text = await _rendered(request, model, http)
        ids = await model.tokenizer.encode(
            text,
            add_special_tokens=request.adds_special_tokens,
            parse_special=request.parse_special is not False,
        )
        found: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": model.bounds.served_tokens,
            "tokens": ids,
        }
        if request.with_pieces:
            found["tokens"] = await _pieces(ids, model.tokenizer)
        if request.return_token_strs:
            found["token_strs"] = await model.tokenizer.tokens_of(ids)
        if len(ids) <= MAX_INLINE_TOKENS:
            return _json(found)
        return await asyncio.to_thread(_json, found)

    async def detokenize(self, http: Request) -> Response:
        request = await parsed_body(http, text_schema.parse_detokenize)
        model = await self._model(request.model)
        check_ids(request.tokens, model, "tokens")
        text = await model.tokenizer.decode(request.tokens)
        return _json({"prompt": text, "content": text})

    async def apply_template(self, http: Request) -> Response:
        request = await parsed_body(http, text_schema.parse_apply_template)
        model = await self._model(request.model, request.chat_template)
        return _json({"prompt": await _rendered(request, model, http)})

    async def _model(self, name: str | None, template: str | None = None) -> ServedModel:
        model = await self._services.model_with(template)
        model.names.resolve(name)
        return model


async def _rendered(request: text_schema.Rendering, model: ServedModel, http: Request) -> str:
    prompt = chat_prompt(
        model,
        request.messages or (),
        request.chat_template_kwargs,
        effort=request.reasoning_effort,
        tools=request.tools,
        continues=request.continues,
    )
    http.scope["state"]["warnings"] = prompt.warnings
    return await prompt.render(
        model, add_generation_prompt=request.add_generation_prompt is not False
    )


async def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if len(ids) <= MAX_INLINE_TOKENS:
        return _pieces_now(ids, tokenizer)
    return await asyncio.to_thread(_pieces_now, ids, tokenizer)


def _pieces_now(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns pieces as llama.cpp writes them: half a character is the list of its bytes."""
    return [{"id": token_id, "piece": _piece(tokenizer.bytes_of(token_id))} for token_id in ids]


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def _json(found: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(found), media_type="application/json")
