"""An engine process that is asked directly, without a server around it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_lm_server.errors import EngineError
from mlx_lm_server.protocol import (
    AddRequest,
    CacheReport,
    LoadFailed,
    LoadModel,
    LoadProgress,
    Outputs,
    Ready,
    RequestOutput,
    Shutdown,
    TokenLogprobs,
    ToServer,
)
from mlx_lm_server.server.engines.engine_process import EngineProcess

ENGINE_COMMAND = (sys.executable, "-m", "mlx_lm_server.engine.engine_main")
LOAD_S = 1800.0
# Without a word of it: an engine speaks each second, and between the steps of a long forward.
SILENCE_S = 120.0
CLOSE_S = 10.0


@dataclass
class Answer:
    """What an engine gave to one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cache: CacheReport | None = None

    def take(self, output: RequestOutput) -> None:
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.cache = self.cache or output.cache


class ProbedEngine:
    """Owns one engine process; lives on the event loop. Leaving the context ends the process, at
    once where something went wrong."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._command = command
        self._messages: asyncio.Queue[ToServer | None] = asyncio.Queue()
        self._process = EngineProcess(self._messages.put_nowait, self._on_lost)

    async def __aenter__(self) -> ProbedEngine:
        """Raises EngineError where no process can be started."""
        try:
            await self._process.start(self._command)
        except OSError as error:
            raise EngineError(f"it cannot be started: {error.strerror}") from error
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._process.send(Shutdown())
            await self._process.wait(CLOSE_S)
        self._process.kill()
        await self._process.wait(CLOSE_S)

    async def load(self, order: LoadModel) -> Ready:
        """Raises EngineError with what the engine says."""
        self._process.send(order)
        while True:
            message = await self._next(LOAD_S, "while it loaded the model")
            if isinstance(message, LoadFailed):
                raise EngineError(message.message)
            if isinstance(message, Ready):
                return message
            assert isinstance(message, LoadProgress | Outputs)

    async def answer(self, requests: Sequence[AddRequest]) -> list[Answer]:
        """Returns the answers to requests that are sent at once. Raises EngineError."""
        answers = {request.req_id: Answer() for request in requests}
        for request in requests:
            self._process.send(request)
        open_ids = set(answers)
        while open_ids:
            message = await self._next(SILENCE_S, "while it answered")
            for output in message.outputs if isinstance(message, Outputs) else ():
                answers[output.req_id].take(output)
                if output.finish_reason == "error":
                    raise EngineError(output.error or "it could not answer")
                if output.finish_reason is not None:
                    open_ids.discard(output.req_id)
        return list(answers.values())

    async def _next(self, limit_s: float, when: str) -> ToServer:
        try:
            async with asyncio.timeout(limit_s):
                message = await self._messages.get()
        except TimeoutError:
            raise EngineError(f"it was silent for {limit_s:g} s {when}") from None
        if message is None:
            await self._process.wait(CLOSE_S)
            raise EngineError(f"it ended {when} ({_how(self._process.exit_code)})")
        return message

    def _on_lost(self) -> None:
        self._messages.put_nowait(None)


def _how(code: int | None) -> str:
    if code is None:
        return "its socket was closed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
