"""The body of a request, parsed without holding up the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from mlx_lm_server.server.body_limit import read_body
from mlx_lm_server.server.json_body import LARGE_BYTES, parse_object
from mlx_lm_server.server.logs import TRACE

log = logging.getLogger(__name__)

# A body this long takes a few milliseconds to parse.
MAX_INLINE_BYTES = 32768
Parsed = TypeVar("Parsed")
# Large bodies are parsed one after the other: while that lasts, one may take many times its size.
_large = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-body")


async def parsed_body(http: Request, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """What `parse` makes of the JSON object in the body; one that is not small leaves the event
    loop meanwhile. Raises InvalidRequestError."""
    body = await read_body(http.receive)
    if log.isEnabledFor(TRACE):
        log.log(TRACE, "%s %s", http.url.path, body.decode("utf-8", "backslashreplace"))
    if len(body) <= MAX_INLINE_BYTES:
        return parse(parse_object(body))
    threads = _large if len(body) > LARGE_BYTES else None
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(threads, lambda: parse(parse_object(body)))
