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
from mlx_lm_server.server.http.endpoint import Endpoint
from mlx_lm_server.server.operations.document_page import front_page, page
from mlx_lm_server.server.protocols.openai.answer_schema import ErrorAnswer

ABOUT = (
    "A field either has its effect or is refused by name. Null is the same as absent. Errors are "
    "OpenAI's error objects."
)
ERRORS = {
    400: "The request is wrong; `param` names the field",
    401: "No API key, or a wrong one",
    403: "Not for this host, or not for this web page",
    404: "No such model",
    408: "The body or the first token took too long",
    413: "The body or the prompt can never fit",
    415: "The body is no JSON, or compressed in a way that is not read",
    429: "Too many requests; see Retry-After",
    503: "Not ready; see Retry-After",
}
STATUSES = {200: "The answer", 503: "The same, where it is bad"}
# Where to go from `/`.
FRONT = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "health": "/health",
    "metrics": "/metrics",
}
PATH_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
Json = dict[str, Any]


class DocumentRoutes:
    """The document and its page are made when they are first asked for. Nothing here tells anything
    of this server, so no key is asked for."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = [*endpoints, *self.endpoints()]

    def endpoints(self) -> list[Endpoint]:
        group = "Documentation"
        return [
            Endpoint(
                "GET",
                "/",
                self.front,
                "What this is, and where to go on",
                group,
                answer=FrontAnswer,
                has_page=True,
                is_open=True,
            ),
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

    async def front(self, http: Request) -> Response:
        if "text/html" in http.headers.get("accept", ""):
            response: Response = HTMLResponse(front_page(FRONT, __version__))
        else:
            found = {"name": "mlx-lm-server", "version": __version__, **FRONT}
            response = Response(msgspec.json.encode(found), media_type="application/json")
        response.headers["vary"] = "accept"
        return response

    async def openapi(self, _: Request) -> Response:
        return Response(msgspec.json.encode(self._document), media_type="application/json")

    async def docs(self, _: Request) -> Response:
        return HTMLResponse(page(self._document))


class FrontAnswer(BaseModel):
    """What serves here, and the paths of what one looks for first."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """mlx-lm-server."""
    version: str
    """Its version."""
    docs: str
    """All that can be asked for, to read."""
    openapi: str
    """The same as an OpenAPI document."""
    models: str
    """Names of the served model."""
    health: str
    """How the server is, and why."""
    metrics: str
    """Numbers for Prometheus."""


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
        paths.setdefault(plain_path(endpoint.path), {})[endpoint.method.lower()] = _operation(
            endpoint
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-lm-server", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": _without_titles(schemas["$defs"]),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def plain_path(path: str) -> str:
    """A path as OpenAPI writes it: parameters without their kinds."""
    return PATH_PARAMETER.sub(r"{\1}", path)


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
    if endpoint.has_page:
        content["text/html"] = {"schema": {"type": "string"}}
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
