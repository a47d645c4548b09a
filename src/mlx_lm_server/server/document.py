"""/openapi.json and /docs, made from the endpoints and the schemas that check what comes in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mlx_lm_server import __version__
from mlx_lm_server.server.document_page import page
from mlx_lm_server.server.endpoint import Endpoint
from mlx_lm_server.server.openai.answer_schema import ErrorAnswer

ABOUT = (
    "A field either has its effect or is refused by name. Null is the same as absent. Errors are "
    "OpenAI's error objects."
)
ERRORS = {
    400: "The request is wrong; `param` names the field",
    401: "No API key, or a wrong one",
    404: "No such model",
    408: "The body or the first token took too long",
    413: "The body or the prompt can never fit",
    429: "Too many requests; see Retry-After",
    503: "Not ready; see Retry-After",
}
STATUSES = {200: "The answer", 503: "The same, where it is bad"}
PATH_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
Json = dict[str, Any]


class DocumentRoutes:
    """Both are made when they are first asked for. They tell nothing of this server, so no key is
    asked for."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = [*endpoints, *self.endpoints()]

    def endpoints(self) -> list[Endpoint]:
        group = "Documentation"
        return [
            Endpoint(
                "GET",
                "/openapi.json",
                self.openapi,
                "This document",
                group,
                answer=OpenApiAnswer,
                is_open=True,
            ),
            Endpoint(
                "GET",
                "/docs",
                self.docs,
                "This document, to read",
                group,
                media_type="text/html",
                is_open=True,
            ),
        ]

    @cached_property
    def _document(self) -> Json:
        return build(self._endpoints)

    async def openapi(self, _: Request) -> Response:
        return Response(msgspec.json.encode(self._document), media_type="application/json")

    async def docs(self, _: Request) -> Response:
        return HTMLResponse(page(self._document))


class OpenApiAnswer(BaseModel):
    """An OpenAPI document."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    openapi: str
    """Version of OpenAPI."""


def build(endpoints: Sequence[Endpoint]) -> Json:
    """OpenAPI 3.1, whose schemas are JSON Schema as pydantic writes it."""
    bodies = {e.body for e in endpoints if e.body}
    answers = {a for e in endpoints for a in (e.answer, e.event) if a} | {ErrorAnswer}
    models = sorted(bodies | answers, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = PATH_PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-lm-server", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": _without_titles(schemas["$defs"]),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> Json:
    """`security` says that a key may be asked for, not that it is."""
    found: Json = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.about,
        "tags": [endpoint.group],
        "security": [] if endpoint.is_open else [{}, {"key": []}],
        "responses": _responses(endpoint),
    }
    names = PATH_PARAMETER.findall(endpoint.path)
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if endpoint.body is not None:
        content = {"application/json": {"schema": _reference(endpoint.body)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _responses(endpoint: Endpoint) -> Json:
    content: Json = {endpoint.media_type: {"schema": {"type": "string"}}}
    if endpoint.answer is not None:
        content = {endpoint.media_type: {"schema": _reference(endpoint.answer)}}
    if endpoint.event is not None:
        content["text/event-stream"] = {"schema": _event(_reference(endpoint.event))}
    found: Json = {
        str(status): {"description": STATUSES[status], "content": content}
        for status in endpoint.statuses
    }
    error = {"application/json": {"schema": _reference(ErrorAnswer)}}
    for status in endpoint.errors:
        found[str(status)] = {"description": ERRORS[status], "content": error}
    return found


def _event(data: Json) -> Json:
    """One of a stream; OpenAPI 3.1 has no words for the whole."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [text, {"const": "[DONE]"}]}},
    }


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _without_titles(value: Any) -> Any:
    """Pydantic makes one of each name, which says nothing new."""
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_titles(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str))
    }
