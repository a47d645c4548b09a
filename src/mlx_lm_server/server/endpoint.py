"""What is served where: the route and its part of /openapi.json, from one declaration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.routing import Route

Handler = Callable[[Any], Awaitable[Any]]
ANY_REQUEST = (400, 401, 408, 413)
ANY_GENERATION = (400, 401, 404, 408, 413, 429, 503)


@dataclass(frozen=True)
class Endpoint:
    """`answer` comes with each of `statuses`, an error object with each of `errors`; None is text
    of `media_type`. `event`: what the events of a streamed answer hold. `is_open`: no key is asked
    for."""

    method: str
    path: str
    handler: Handler
    about: str
    group: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    media_type: str = "application/json"
    statuses: tuple[int, ...] = (200,)
    errors: tuple[int, ...] = ()
    is_open: bool = False

    def route(self) -> Route:
        return Route(self.path, self.handler, methods=[self.method])
