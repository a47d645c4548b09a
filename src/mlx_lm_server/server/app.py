"""The ASGI application: routes inside, middleware around them."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_lm_server.server.api_keys import ApiKeys
from mlx_lm_server.server.cache_routes import CacheRoutes
from mlx_lm_server.server.connection import ConnectionLimits
from mlx_lm_server.server.document import DocumentRoutes
from mlx_lm_server.server.health import HealthRoutes
from mlx_lm_server.server.http_errors import HttpError
from mlx_lm_server.server.middleware import Auth, BodyLimit, Border
from mlx_lm_server.server.openai.routes import OpenAIRoutes
from mlx_lm_server.server.openai.text_routes import TextRoutes
from mlx_lm_server.server.page_guard import PageGuard
from mlx_lm_server.server.services import Services


def create_app(services: Services, keys: ApiKeys, limits: ConnectionLimits) -> ASGIApp:
    server = services.config.server
    routes = Routes(services)
    app: ASGIApp = BodyLimit(routes, server.max_request_bytes, limits.body_s)
    app = Auth(app, keys, routes.open_paths)
    app = PageGuard(app, server, keys)
    app = Border(app, services.metrics.http_responses)
    if server.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=server.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


class Routes:
    """The innermost layer. What has no route raises HttpError; Starlette's own application would
    answer errors before the Border sees them."""

    def __init__(self, services: Services) -> None:
        kinds = (OpenAIRoutes, TextRoutes, CacheRoutes, HealthRoutes)
        parts = [routes(services) for routes in kinds]
        endpoints = [endpoint for part in parts for endpoint in part.endpoints()]
        endpoints += DocumentRoutes(endpoints).endpoints()
        routes = [endpoint.route() for endpoint in endpoints]
        self._router = Router(routes, redirect_slashes=False)
        self.open_paths = [endpoint.path for endpoint in endpoints if endpoint.is_open]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # tells the router to raise what it cannot route
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
            message = f"{scope['method']} {scope['path']} is not served here"
            raise HttpError(error.status_code, message, code, error.headers) from error
