"""An engine process that has imported everything and waits for a model to load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from mlx_lm_server.protocol import ToServer, WarmUp
from mlx_lm_server.server.engines.engine_process import EngineProcess

log = logging.getLogger(__name__)


class Standby:
    """Owned by the supervisor, which takes the process when it needs one. It has no model, so it
    holds little memory."""

    def __init__(self, command: Sequence[str], order: WarmUp) -> None:
        self._command = command
        self._order = order
        self._process: EngineProcess | None = None
        self._starting: asyncio.Task[None] | None = None

    def prepare(self, after_s: float) -> None:
        """Has a process ready some time from now, unless there is one."""
        if self._starting is None and self._process is None:
            self._starting = asyncio.create_task(self._start(after_s), name="standby")

    async def _start(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        process = EngineProcess(_ignore, self._forget)
        try:
            await process.start(self._command)
        except OSError as error:
            log.warning("no engine waits to take over: %s", error)
            return
        except asyncio.CancelledError:
            process.kill()
            raise
        process.send(self._order)
        self._process = process

    def _forget(self) -> None:
        """It has ended by itself: the next engine starts from nothing, as without a standby."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def take(self) -> EngineProcess | None:
        """Returns the process, which is the taker's now; None where there is none."""
        self._cancel()
        process, self._process = self._process, None
        if process is None or process.exit_code is not None:
            return None
        return process

    async def stop(self) -> None:
        """Leaves no process behind."""
        starting = self._starting
        self._cancel()
        if starting is not None:
            with suppress(asyncio.CancelledError):
                await starting
        if (process := self.take()) is not None:
            process.kill()
            await process.wait(5.0)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _cancel(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None


def _ignore(_message: ToServer) -> None:
    return
