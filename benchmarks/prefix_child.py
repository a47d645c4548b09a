"""What the prefix cache saves, measured on an engine stepped by hand in a process of its own.

    python -m benchmarks.prefix_child tail|shared|oversubscribed ARGUMENTS

Prints one line of JSON; started by `benchmarks.prefix`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.models import ensure_models
from mlx_lm_server.core.kv_layout import DEFAULT_RULES
from mlx_lm_server.protocol import AddRequest, EngineStats, LoadModel, RequestOutput, SamplingParams

FIRST_ID, LAST_ID = 300, 8000


class Trial:
    """An engine and its random prompts."""

    def __init__(self, **order: Any) -> None:
        from mlx_lm_server.runner.backends import blas

        chosen = blas.preload(None)
        from mlx_lm_server.engine.assembly import assemble

        model = LoadModel(str(ensure_models()["float32"]), **order)
        self.core, self.ready = assemble(model, chosen, lambda _stage, _fraction: None)
        self._rng = Random(7)
        self._num_requests = 0

    @property
    def stats(self) -> EngineStats:
        return self.core.stats()

    def ids(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]

    def ask(self, prompt: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens, seed=0, temperature=0.0)
        self._num_requests += 1
        self.core.handle([AddRequest(f"r{self._num_requests}", prompt, sampling)])

    def finish(self) -> list[RequestOutput]:
        outputs = []
        while self.core.has_work:
            outputs += self.core.step()
        return outputs

    def time(self, prompt: list[int]) -> float:
        """Seconds until the prompt has its first token."""
        begun = perf_counter()
        self.ask(prompt, 1)
        self.finish()
        return perf_counter() - begun


def tail(prefix_tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """The bare forward of some tokens after a context: what a warm start cannot go below."""
    from mlx_lm_server.runner.backends import blas

    chosen = blas.preload(None)
    import mlx.core as mx

    from benchmarks.contenders.bare import SLAB, BareLoop
    from mlx_lm_server.core.plan import CreateSlab, DropSlab

    loop = BareLoop(str(ensure_models()["float32"]), None, chosen)
    rng = Random(7)
    ids = [rng.randrange(FIRST_ID, LAST_ID) for _ in range(prefix_tokens + new_tokens)]
    taken = []
    for _ in range(rounds + 1):
        loop.storage.apply(CreateSlab(SLAB, 1, DEFAULT_RULES.capacity_for(len(ids))))
        mx.eval(loop.prefill(0, ids[:prefix_tokens]))
        begun = perf_counter()
        mx.eval(loop.prefill(0, ids[prefix_tokens:], prefix_tokens))
        taken.append(perf_counter() - begun)
        loop.storage.apply(DropSlab(SLAB))
    return {"forward_s": median(taken[1:])}


def shared(prefix_tokens: int, suffix_tokens: int, num_requests: int) -> dict[str, Any]:
    """Tokens that are computed where requests with one prefix come at once."""
    trial = Trial()
    prefix = trial.ids(prefix_tokens)
    for _ in range(num_requests):
        trial.ask(prefix + trial.ids(suffix_tokens), 16)
    begun = perf_counter()
    trial.finish()
    needed = prefix_tokens + num_requests * suffix_tokens
    return {
        "computed": trial.stats.prefill_tokens_total,
        "over_needed": trial.stats.prefill_tokens_total
        / (1.05 * prefix_tokens + num_requests * suffix_tokens),
        "needed": needed,
        "seconds": perf_counter() - begun,
    }


def oversubscribed(num_rows: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Twice as many requests as the memory holds rows, against as many as it holds."""
    room = num_rows * DEFAULT_RULES.capacity_for(prompt_tokens + output_tokens)
    trial = Trial(max_kv_tokens=room, prefix_cache=True)
    found: dict[str, Any] = {"room_tokens": room}
    for label, num_requests in (("warm-up", 2), ("fits", num_rows), ("twice", 2 * num_rows)):
        rates = []
        for _ in range(1 if label == "warm-up" else 3):
            for _ in range(num_requests):
                trial.ask(trial.ids(prompt_tokens), output_tokens)
            begun = perf_counter()
            outputs = trial.finish()
            rates.append(sum(len(o.token_ids) for o in outputs) / (perf_counter() - begun))
            reasons = [o.finish_reason for o in outputs if o.finish_reason]
            assert reasons == ["length"] * num_requests, reasons
        found[label] = median(rates)
        found[f"{label}_preemptions"] = trial.stats.num_preemptions_total
    return found


MODES: dict[str, Callable[..., dict[str, Any]]] = {
    "tail": tail,
    "shared": shared,
    "oversubscribed": oversubscribed,
}


def main() -> None:
    mode, *arguments = sys.argv[1:]
    print(json.dumps(MODES[mode](*(int(word) for word in arguments))), flush=True)


if __name__ == "__main__":
    main()
