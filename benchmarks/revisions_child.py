"""Steps the engine of whichever sources are first on the path, and tells its CPU time.

    python revisions_child.py MODEL DIVISOR

It calls only what has been the same for long: `assemble`, `EngineCore.handle`, `EngineCore.step`.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from typing import Any

# Rows, tokens of each prompt and of each answer, prompts that come late.
LOADS = {"1 row": (1, 50, 250, 0), "8 rows": (8, 50, 120, 0), "32 rows": (32, 50, 60, 0)}
LOADS["mixed"] = (8, 50, 150, 6)
LATE_PROMPT, LATE_ANSWER, STEPS_BETWEEN = 400, 40, 20
THREADS = 2


def preloaded() -> Any:
    """Loads the BLAS from where the revision keeps it."""
    for place in ("mlx_lm_server.runner.backends.blas", "mlx_lm_server.runner.blas"):
        try:
            return importlib.import_module(place).preload(THREADS)
        except ImportError:
            continue
    raise SystemExit("this revision keeps its BLAS elsewhere")


class Stepped:
    """One engine and the requests that it was given."""

    def __init__(self, model: str) -> None:
        blas = preloaded()
        from mlx_lm_server.engine.assembly import assemble
        from mlx_lm_server.protocol import LoadModel

        order = LoadModel(model, num_threads=THREADS)
        self._core, _ = assemble(order, blas, lambda *_: None)
        self._rng = random.Random(1)
        self._count = 0

    def run(self, rows: int, prompt: int, answer: int, late: int) -> int:
        """Returns how many tokens came."""
        for _ in range(rows):
            self._add(prompt, answer)
        num_tokens = steps = 0
        while self._core.has_work:
            num_tokens += sum(len(output.token_ids) for output in self._core.step())
            steps += 1
            if late and steps % STEPS_BETWEEN == 0:
                late -= 1
                self._add(LATE_PROMPT, LATE_ANSWER)
        return num_tokens

    def _add(self, prompt: int, answer: int) -> None:
        from mlx_lm_server.protocol import AddRequest, SamplingParams

        self._count += 1
        ids = [self._rng.randrange(300, 8000) for _ in range(prompt)]
        sampling = SamplingParams(max_tokens=answer, seed=self._count, temperature=0.7)
        self._core.handle([AddRequest(f"r{self._count}", ids, sampling)])


def main(model: str, divisor: int) -> None:
    engine, found = Stepped(model), {}
    engine.run(8, 20, 20, 0)
    for name, (rows, prompt, answer, late) in LOADS.items():
        begun = time.process_time()
        num_tokens = engine.run(rows, prompt, max(1, answer // divisor), late // divisor)
        found[name] = round(1000 * (time.process_time() - begun) / num_tokens, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
