"""What is served where: the route and its part of /openapi.json, from one declaration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.routing import Route

Handler = Callable[[Any], Awaitable[Any]]
ANY_REQUEST = (400, 401, 403, 408, 413, 415, 429)
ANY_GENERATION = (*ANY_REQUEST, 404, 503)
# What clients are told to put before paths, and often leave out.
PREFIX = "/v1"


@dataclass(frozen=True)
class Endpoint:
    """`answer` comes with each of `statuses`, an error object with each of `errors`; None is text
    of `media_type`. `event`: what the events of a streamed answer hold. `has_page`: browsers get
    HTML. `is_open`: no key is asked for."""

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
    has_page: bool = False
    is_open: bool = False

    def routes(self) -> list[Route]:
        """Returns the routes to it: what is under /v1 is served without that too."""
        paths = [self.path]
        if self.path.startswith(PREFIX + "/"):
            paths.append(self.path.removeprefix(PREFIX))
        return [Route(path, self.handler, methods=[self.method]) for path in paths]
