"""The body of a request, parsed without holding up the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from mlx_lm_server.server.http.body_limit import read_body
from mlx_lm_server.server.http.json_body import LARGE_BYTES, parse_object
from mlx_lm_server.server.large_work import run_large
from mlx_lm_server.server.logs import TRACE

log = logging.getLogger(__name__)

# A body this long takes a few milliseconds to parse.
MAX_INLINE_BYTES = 32768
Parsed = TypeVar("Parsed")


async def parsed_body(http: Request, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """What `parse` makes of the JSON object in the body; one that is not small leaves the event
    loop meanwhile. Raises InvalidRequestError."""
    body = await read_body(http.receive)
    if log.isEnabledFor(TRACE):
        log.log(TRACE, "%s %s", http.url.path, body.decode("utf-8", "backslashreplace"))
    if len(body) <= MAX_INLINE_BYTES:
        return parse(parse_object(body))
    run = run_large if len(body) > LARGE_BYTES else asyncio.to_thread
    return await run(lambda: parse(parse_object(body)))
