from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fake_openai import OTHER, FakeServer, until
from starlette.applications import Starlette
from starlette.routing import Route


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fake = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
        routes = [
            Route(path, fake.answer, methods=["POST"])
            for base in ("", OTHER)
            for path in (f"{base}/v1/completions", f"{base}/v1/chat/completions")
        ]
        routes.append(Route("/v1/models", fake.models))
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="warning", timeout_graceful_shutdown=1
        )
        uvicorn_server = uvicorn.Server(config)
        task = asyncio.create_task(uvicorn_server.serve(sockets=[listener]))
        await until(lambda: uvicorn_server.started)
        yield fake
        uvicorn_server.should_exit = True
        await task
