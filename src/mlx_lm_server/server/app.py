"""The ASGI application: routes inside, middleware around them."""

from __future__ import annotations

import difflib

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_lm_server.server.http.api_keys import ApiKeys
from mlx_lm_server.server.http.body_limit import BodyLimit
from mlx_lm_server.server.http.connection import ConnectionLimits
from mlx_lm_server.server.http.http_errors import HttpError
from mlx_lm_server.server.http.middleware import Auth, Border
from mlx_lm_server.server.http.page_guard import PageGuard
from mlx_lm_server.server.operations.cache_routes import CacheRoutes
from mlx_lm_server.server.operations.document import DocumentRoutes, plain_path
from mlx_lm_server.server.operations.health import HealthRoutes
from mlx_lm_server.server.protocols.openai.routes import OpenAIRoutes
from mlx_lm_server.server.protocols.openai.text_routes import TextRoutes
from mlx_lm_server.server.services import Services

# Likeness of two paths, 0 to 1, from which one may be meant for the other.
NEAR = 0.6


def create_app(services: Services, keys: ApiKeys, limits: ConnectionLimits) -> ASGIApp:
    server = services.config.server
    routes = Routes(services)
    app: ASGIApp = BodyLimit(routes, server.max_request_bytes, limits.body_s)
    app = Auth(app, keys, routes.open_paths)
    app = PageGuard(app, server, keys)
    app = Border(app, services.metrics.http_responses)
    app = PlainPath(app)
    if server.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=server.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


class PlainPath:
    """`/v1/models/` and `//v1/models`, which come of joining, are `/v1/models` further in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parts = scope["path"].split("/")
            scope = {**scope, "path": "/" + "/".join(filter(None, parts))}
        await self._app(scope, receive, send)


class Routes:
    """The innermost layer. What has no route raises HttpError; Starlette's own application would
    answer errors before the Border sees them."""

    def __init__(self, services: Services) -> None:
        kinds = (OpenAIRoutes, TextRoutes, CacheRoutes, HealthRoutes)
        parts = [routes(services) for routes in kinds]
        endpoints = [endpoint for part in parts for endpoint in part.endpoints()]
        endpoints += DocumentRoutes(endpoints).endpoints()
        routes = [route for endpoint in endpoints for route in endpoint.routes()]
        self._router = Router(routes, redirect_slashes=False)
        self._paths = sorted({plain_path(endpoint.path) for endpoint in endpoints})
        self.open_paths = [endpoint.path for endpoint in endpoints if endpoint.is_open]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # tells the router to raise what it cannot route
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            raise self._refusal(scope["method"], scope["path"], error) from error

    def _refusal(self, method: str, path: str, error: HTTPException) -> HttpError:
        what = f"{method} {path} is not served here"
        if error.status_code == 405:
            allowed = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
            message = f"{what}; the path takes {allowed}"
            return HttpError(405, message, "method_not_allowed", {"allow": allowed})
        near = difflib.get_close_matches(path, self._paths, n=2, cutoff=NEAR)
        shown = " and ".join(f"`{one}`" for one in near)
        hint = f"; the nearest that is: {shown}" if near else ""
        return HttpError(404, f"{what}{hint}; all are listed at `/docs`", "unknown_url")
