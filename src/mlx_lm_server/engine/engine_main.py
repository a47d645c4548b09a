"""The entry of an engine process: `python -m mlx_lm_server.engine.engine_main --fd N --note-fd M`.

The server starts it with one end of a socket pair and a file for its note of the steps under way,
and speaks first (`LoadModel`, or before that `WarmUp`). The engine ends
when the socket closes; a thread watches for the server's death, because the main thread may be in
the middle of a long forward.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlx_lm_server import errors
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.engine.link import LinkClosed, ServerLink
from mlx_lm_server.engine.told_steps import ToldSteps
from mlx_lm_server.protocol import (
    Abort,
    AddRequest,
    LoadFailed,
    LoadModel,
    LoadProgress,
    Outputs,
    RequestOutput,
    Shutdown,
    ToEngine,
    WarmUp,
)
from mlx_lm_server.step_note import StepNote

if TYPE_CHECKING:
    from mlx_lm_server.runner.backends.blas import Blas

HEARTBEAT_S = 1.0
TIER_LOOK_S = 0.001
PARENT_CHECK_S = 1.0

log = logging.getLogger(__name__)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--fd", type=int, required=True)
    arguments.add_argument("--note-fd", type=int, required=True)
    given = arguments.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    _watch_parent(os.getppid())
    logging.basicConfig(format="engine %(levelname)s %(message)s")
    with contextlib.suppress(LinkClosed):
        serve(ServerLink(socket.socket(fileno=given.fd)), StepNote(given.note_fd))


def serve(
    link: ServerLink, note: StepNote, prepare: Callable[[EngineCore], None] = lambda _: None
) -> None:
    """Loads what the server orders, prepares what came of it, then steps until the server says
    stop. Raises LinkClosed."""
    messages = _first_messages(link)
    warm = None
    if isinstance(order := messages[0], WarmUp):
        warm = _warm_up(order.num_threads, with_adapters=order.with_adapters)
        messages = messages[1:] or _first_messages(link)
    order, rest = messages[0], messages[1:]
    if isinstance(order, Shutdown):
        return
    if not isinstance(order, LoadModel):
        raise LinkClosed(f"expected LoadModel first, got {type(order).__name__}")
    core = _load(link, order, warm)
    if core is not None:
        core.told_steps = ToldSteps(note)
        prepare(core)
        EngineLoop(link, core).run(rest)


def _first_messages(link: ServerLink) -> list[ToEngine]:
    """Returns what the server says, whenever that is; at least one message."""
    while not (messages := link.receive(wait_s=3600)):
        continue
    return messages


def _warm_up(num_threads: int | None, *, with_adapters: bool) -> Blas:
    """Imports all that a model needs."""
    # The BLAS must be in the process before mlx is, so nothing above may import the runner.
    from mlx_lm_server.runner.backends import blas
    from mlx_lm_server.runner.loading import light_import

    chosen = blas.preload(num_threads)
    light_import.import_mlx_lm(with_adapters=with_adapters)
    importlib.import_module("mlx_lm_server.engine.assembly")
    return chosen


def _load(link: ServerLink, order: LoadModel, warm: Blas | None) -> EngineCore | None:
    chosen = warm or _warm_up(order.num_threads, with_adapters=order.adapter_path is not None)
    from mlx_lm_server.engine.assembly import assemble

    def progress(stage: str, fraction: float) -> None:
        link.send(LoadProgress(stage, fraction))

    try:
        core, ready = assemble(order, chosen, progress)
    except errors.ServerError as error:
        link.send(LoadFailed(type(error).__name__, str(error)))
        return None
    link.send(ready)
    return core


class EngineLoop:
    """Steps as long as there is work and listens in between. The border of the engine: what no
    one expected ends the process here, and the server restarts it."""

    def __init__(self, link: ServerLink, core: EngineCore) -> None:
        self._link = link
        self._core = core
        self._told_s = 0.0

    def run(self, messages: Sequence[ToEngine]) -> None:
        """Until Shutdown. Raises LinkClosed."""
        while not any(isinstance(message, Shutdown) for message in messages):
            ended = self._core.handle([m for m in messages if isinstance(m, AddRequest | Abort)])
            if self._core.has_work:
                self._step(ended)
            else:
                if not messages:
                    self._core.rest()
                self._tell(ended)
            messages = self._link.receive(self._wait_s())
        self._core.close()

    def _step(self, ended: list[RequestOutput]) -> None:
        """Goes one step further and tells each part of its outputs as it comes."""
        is_told = False
        for part in self._core.step_in_parts():
            if outputs := ended + part:
                self._tell(outputs)
                ended, is_told = [], True
        if not is_told and (ended or not self._core.has_work or self._is_silent):
            self._tell(ended)

    @property
    def _is_silent(self) -> bool:
        """Whether nothing was told for a while, as in a long prefill: the server would take this
        process for hung."""
        return time.monotonic() - self._told_s >= HEARTBEAT_S

    def _wait_s(self) -> float:
        if self._core.waits_for_tier:
            return TIER_LOOK_S
        return 0 if self._core.has_work else HEARTBEAT_S

    def _tell(self, outputs: list[RequestOutput]) -> None:
        self._told_s = time.monotonic()
        self._link.send(Outputs(outputs, self._core.stats(), self._core.take_step_tokens()))


def _watch_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    main()
