"""The endpoint that tells what the prefix cache did for a request."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlx_lm_server.server.http.endpoint import ANY_REQUEST, Endpoint
from mlx_lm_server.server.protocols.openai import answer_schema
from mlx_lm_server.server.services import Services


class CacheRoutes:
    def __init__(self, services: Services) -> None:
        self._services = services

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                "GET",
                "/v1/cache/explain",
                self.explain,
                "Why the prompt of an answer (`id`, or the last one) was cached or not",
                "Server",
                answer=answer_schema.CacheExplanationAnswer,
                errors=ANY_REQUEST,
            )
        ]

    async def explain(self, http: Request) -> Response:
        client_key = http.scope["state"]["client_key"]
        id, facts = self._services.cache_reports.of(http.query_params.get("id"), client_key)
        prompts = self._services.explain(facts)
        found = {"id": id, "object": "cache.explanation", "prompts": prompts}
        return Response(msgspec.json.encode(found), media_type="application/json")
