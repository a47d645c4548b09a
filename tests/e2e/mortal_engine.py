"""The real engine, which dies where a test says: `python mortal_engine.py FOLDER --fd N …`.

Whom a single request shall kill is told by its seed. A file `FOLDER/death.json` is an order: the
first engine that comes to that stage takes the file away and dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm_server.core.plan import RestoreBlocks, StepPlan, StepResult
from mlx_lm_server.engine.engine_core import EngineCore, Handle, Runner
from mlx_lm_server.engine.engine_main import serve
from mlx_lm_server.engine.link import LinkClosed, ServerLink
from mlx_lm_server.protocol import AddRequest
from mlx_lm_server.step_note import StepNote

# Seeds with a meaning: the engine dies whenever it computes the request …
KILLS = 666
KILLS_LATE = 667  # … from its sixth token on

Order = dict[str, Any]


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


class Orders:
    """What is to happen once, in one engine or the next."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "death.json"

    def look(self, stage: str, num_told: int = 0) -> None:
        """Does what is ordered for this stage, if it has come so far."""
        if not self._file.exists():
            return
        order = json.loads(self._file.read_text())
        if order["stage"] != stage or num_told < order["after"]:
            return
        self._file.unlink()
        if order["how"] == "stop":
            time.sleep(60)
        if order["how"] == "raise":
            raise RuntimeError("[METAL] Command buffer execution failed: submissions ignored")
        die(getattr(signal, order["how"]))


class MortalHandle:
    def __init__(self, handle: Handle, is_last: bool, orders: Orders) -> None:
        self._handle, self._is_last, self._orders = handle, is_last, orders

    def collect(self) -> Iterator[StepResult]:
        for part in self._handle.collect():
            if self._is_last and part:
                self._orders.look("last")  # computed, and told to nobody
            yield part


class MortalRunner:
    """Looks at each plan before it is submitted."""

    def __init__(self, runner: Runner, orders: Orders) -> None:
        self._runner, self._orders = runner, orders
        self._seeds: dict[int, int] = {}  # by row
        self._prompts: dict[int, int] = {}
        self._is_new: dict[int, bool] = {}

    def submit(self, plan: StepPlan) -> Handle:
        for joined in plan.joined_rows:
            self._seeds[joined.row] = joined.sampling.seed
            self._prompts[joined.row] = len(joined.prompt_ids)
        for work in plan.works:
            num_told = work.end - self._prompts[work.row]
            is_killer = self._seeds[work.row] == KILLS
            if is_killer or (self._seeds[work.row] == KILLS_LATE and num_told > 5):
                die(signal.SIGSEGV)
        if any(isinstance(op, RestoreBlocks) for op in plan.saves):
            self._orders.look("restore")
        if any(not chunk.yields for chunk in plan.chunks):
            self._orders.look("prefill")
        for work in plan.decodes:
            self._orders.look("decode", work.end - self._prompts[work.row])
        is_last = any(work.is_awaited for work in plan.decodes)
        return MortalHandle(self._runner.submit(plan), is_last, self._orders)


def main() -> None:
    folder, _, fd, _, note_fd = sys.argv[1:]
    orders = Orders(Path(folder))

    def prepare(core: EngineCore) -> None:
        core._runner = MortalRunner(core._runner, orders)
        handle = core.handle

        def take(messages: Any) -> Any:
            messages = list(messages)
            ended = handle(messages)
            if any(isinstance(message, AddRequest) for message in messages):
                orders.look("queued")
            return ended

        core.handle = take  # type: ignore[method-assign]

    try:
        serve(ServerLink(socket.socket(fileno=int(fd))), StepNote(int(note_fd)), prepare)
    except LinkClosed:
        return


if __name__ == "__main__":
    main()
