"""A long prompt that arrives beside decoding rows, on a clock that counts CPU time.

The engine runs in a process of its own, pinned to one core and with one thread, and takes the CPU
time of its process for the time: what it learns, plans and reports does not depend on how busy the
machine is. Other work still shows, through caches and memory, so the best of some rounds counts: a
stall that the engine makes itself is in every one of them.

    python -m benchmarks engine long-prompt
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from random import Random
from statistics import median, quantiles
from time import process_time
from typing import Any

from benchmarks import reaper
from benchmarks.claims import Claim
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console

NUM_DECODERS, DECODER_PROMPT_TOKENS, CALM_STEPS = 4, 128, 60
MAX_TOKENS = 2000


def long_prompt(effort: Effort) -> Findings:
    """A 3000-token prompt beside 4 decoders, in CPU time: the longest step, the prefill's speed."""
    tokens = 600 if effort.is_quick else 3000
    child = reaper.start(
        [sys.executable, "-m", "benchmarks.long_prompt", str(tokens), str(effort.rounds)],
        stdout=subprocess.PIPE,
    )
    answer, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"the engine ended with {child.returncode}")
    rounds: list[dict[str, Any]] = json.loads(answer.splitlines()[-1])
    for one in rounds:
        shown = (f"{name} {value:.3g}" for name, value in one.items() if name != "steps_ms")
        console.print("  " + "  ".join(shown))
    best = min(one["longest"] for one in rounds)
    share = max(one["prefill_share"] for one in rounds)
    return [
        Claim("longest step over the calm median, best round", best, at_most=3.0),
        Claim("95 % of the steps over the calm median", median(one["p95"] for one in rounds)),
        Claim("prefill speed over undisturbed, one thread, best round", share),
    ], rounds


class Trial:
    """One engine, round after round."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        from mlx_lm_server.protocol import LoadModel
        from mlx_lm_server.runner.backends import blas

        chosen = blas.preload(1)
        from mlx_lm_server.engine.assembly import assemble

        order = LoadModel(model, num_threads=1)
        self._core, _ = assemble(order, chosen, lambda _stage, _fraction: None, process_time)
        self._prompt_tokens = prompt_tokens
        self._rng = Random(5)

    def alone_s(self) -> float:
        """CPU time to the first token of the long prompt, with nobody beside it."""
        self._ask("alone", self._prompt_tokens, 2)
        taken_s = sum(self._steps_s(lambda outputs: "alone" in outputs))
        self._abort("alone")
        return taken_s

    def run(self) -> dict[str, Any]:
        alone_s = self.alone_s()
        decoders = [f"decoder{i}" for i in range(NUM_DECODERS)]
        for name in decoders:
            self._ask(name, DECODER_PROMPT_TOKENS, MAX_TOKENS)
        self._steps_s(lambda outputs: len(outputs) == NUM_DECODERS)
        calm = [self._step_s()[0] for _ in range(CALM_STEPS)]
        self._ask("long", self._prompt_tokens, 2)
        steps = self._steps_s(lambda outputs: "long" in outputs)
        self._abort("long", *decoders)
        calm_s = median(calm)
        return {
            "alone_ms": alone_s * 1e3,
            "calm_ms": calm_s * 1e3,
            "longest": max(steps) / calm_s,
            "p95": quantiles(steps, n=20)[-1] / calm_s,
            "median": median(steps) / calm_s,
            "num_steps": len(steps),
            "prefill_share": alone_s / sum(steps),
            "steps_ms": [round(step * 1e3, 2) for step in steps],
        }

    def _steps_s(self, is_over: Callable[[set[str]], bool]) -> list[float]:
        """Step until the requests that got a token satisfy this; the CPU time of each step."""
        taken = []
        while True:
            step_s, outputs = self._step_s()
            taken.append(step_s)
            if is_over(outputs):
                return taken

    def _step_s(self) -> tuple[float, set[str]]:
        begun = process_time()
        outputs = self._core.step()
        return process_time() - begun, {output.req_id for output in outputs}

    def _ask(self, name: str, num_tokens: int, max_tokens: int) -> None:
        from mlx_lm_server.protocol import AddRequest, SamplingParams

        prompt = [self._rng.randrange(300, 8000) for _ in range(num_tokens)]
        sampling = SamplingParams(max_tokens, seed=0, temperature=0.0)
        self._core.handle([AddRequest(name, prompt, sampling)])

    def _abort(self, *names: str) -> None:
        from mlx_lm_server.protocol import Abort

        self._core.handle([Abort(name) for name in names])
        while self._core.has_work:
            self._core.step()


def main() -> None:
    prompt_tokens, num_rounds = (int(word) for word in sys.argv[1:])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    trial = Trial(str(ensure_models()["float32"]), prompt_tokens)
    trial.run()  # warms up
    print(json.dumps([trial.run() for _ in range(num_rounds)]))


if __name__ == "__main__":
    main()
