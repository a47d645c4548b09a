"""Measures what a model's forwards cost, in chunks that are as large as the time allows.

A chunk of 256 tokens takes a small model 20 ms and a large one seconds. So the size is found by
doubling, up to a share of the time that measuring may take, and what no time is left for is done
once instead of twice: the cost model learns the rest while serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.plan import CreateSlab, StepPlan
from mlx_lm_server.core.submitting import Submitting
from mlx_lm_server.runner.loading.attention_memory import bytes_per_pair, bytes_per_read_token
from mlx_lm_server.runner.loading.both_ways import BothWays
from mlx_lm_server.runner.loading.copy_speed import copy_bytes_per_s
from mlx_lm_server.runner.loading.tiny_plans import (
    SMALL_SLAB,
    chunk_of,
    decode_of,
    plan_of,
    scratch,
)
from mlx_lm_server.runner.seam.forwards import Forward
from mlx_lm_server.runner.state.kv_storage import KVStorage

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 256
# What a token costs, and the memory that it takes, is read off a chunk of at least so many: smaller
# ones tell a third too little memory.
LEAST_LARGE_CHUNK = 64
FAR_CONTEXT = 1024
# One chunk may take such a share of the time for all of it.
CHUNK_SHARE = 1 / 16
THREADS_SHARE = 0.5
# So often fewer threads have to be the faster ones.
THREAD_TRIALS = 3
# Two runs of one thing that differ by more are no measurement to keep.
AGREEMENT = 0.15
# What comes from the cache may go to memory that nobody has touched, which takes longer. A guess
# that is too slow is given up sooner than one that is too fast.
FRESH_SHARE = 0.75


class Measurer:
    """Times forwards for at most about `limit_s` seconds. Used once, on the engine's thread."""

    def __init__(
        self,
        forward: Forward,
        storage: KVStorage,
        limit_s: float,
        num_heads: int,
        both_ways: BothWays | None = None,
    ) -> None:
        self._forward = forward
        self._storage = storage
        self._limit_s = limit_s
        self._num_heads = num_heads
        self._both_ways = both_ways
        self._begun_s = time.perf_counter()
        self._is_steady = True
        self._chunk_tokens = SMALLEST_CHUNK

    def measured(self, most_threads: int | None, with_threads: Callable[[int], object]) -> Measured:
        """Returns the costs with as many threads as are fastest; None leaves them as they are."""
        with scratch(self._storage, CreateSlab(SMALL_SLAB, 1, FAR_CONTEXT + LARGEST_CHUNK)):
            self._chunk_tokens = self._affordable_chunk()
            threads = self._threads(most_threads, with_threads)
            costs, activation_bytes = self._costs()
            self._forward.forget([0])
        copied = copy_bytes_per_s(self._storage, self._has_time)
        token_bytes = self._storage.geometry.full_bytes_per_token
        costs = replace(costs, per_copied_token_s=token_bytes / (FRESH_SHARE * copied))
        submitting = self._submitting(costs.base_s)
        forward_bytes = self._forward_bytes(activation_bytes)
        return Measured(threads, costs, forward_bytes, copied, submitting, self._is_steady)

    def _forward_bytes(self, per_token: int) -> ForwardBytes:
        layers = self._storage.layers
        if not layers:
            return ForwardBytes(per_token)
        kernel = self._storage.backend.kernel(layers[0].dtype)
        per_pair = bytes_per_pair(kernel, layers, self._num_heads)
        per_read_token = bytes_per_read_token(layers)
        return ForwardBytes(per_token, per_pair, per_read_token, not kernel.multiplies_codes)

    def _has_time(self, share: float = 1.0) -> bool:
        return time.perf_counter() - self._begun_s < share * self._limit_s

    def _affordable_chunk(self) -> int:
        """Returns the largest chunk that takes no more than its share; also the warm-up."""
        size = SMALLEST_CHUNK
        self._run(plan_of(chunks=[chunk_of(0, 0, size)]))
        while size < LARGEST_CHUNK:
            taken_s = self._run(plan_of(chunks=[chunk_of(0, 0, size)]))
            if 2 * taken_s > CHUNK_SHARE * self._limit_s:
                break
            size *= 2
        return size

    def _threads(self, most: int | None, with_threads: Callable[[int], object]) -> int | None:
        if most is None:
            return None

        def time_s(num_threads: int) -> float:
            with_threads(num_threads)
            return self._run(plan_of(chunks=[chunk_of(0, 0, self._chunk_tokens)]))

        chosen = fastest_threads(most, time_s, lambda: self._has_time(THREADS_SHARE))
        with_threads(chosen)
        return chosen

    def _costs(self) -> tuple[StepCosts, int]:
        """Returns first costs for the cost model: of a decode row, of two sizes of chunk, and of a
        chunk far from the start; and what a token takes in a forward beyond what is held."""
        large = max(self._chunk_tokens, LEAST_LARGE_CHUNK)
        small = max(self._chunk_tokens // 4, 4)
        one_s = self._best_s(plan_of([decode_of(0, large)]), is_checked=True)
        mx.reset_peak_memory()
        held_bytes = mx.get_active_memory()
        large_s = self._best_s(plan_of(chunks=[chunk_of(0, 0, large)]))
        activation_bytes = max(1, (mx.get_peak_memory() - held_bytes) // large)
        small_s = self._best_s(plan_of(chunks=[chunk_of(0, 0, small)]))
        far_s = self._best_s(plan_of(chunks=[chunk_of(0, FAR_CONTEXT, small)]))
        per_token_s = max(1e-7, (large_s - small_s) / (large - small))
        per_pair_s = max(per_token_s / 1e5, (far_s - small_s) / (small * FAR_CONTEXT))
        costs = StepCosts(
            base_s=max(1e-5, one_s - per_token_s),
            per_prefill_token_s=per_token_s,
            per_row_s=per_token_s,
            per_kv_token_s=per_pair_s,
            per_prefill_pair_s=per_pair_s,
        )
        return costs, activation_bytes

    def _submitting(self, step_s: float) -> Submitting | None:
        """Returns both ways to submit forwards; None where a step takes so long that there is no
        time to try, nor would a device's waiting be much of it."""
        if self._both_ways is None or self._both_ways.least_s(step_s) > self._limit_s:
            return None
        return self._both_ways.measured(self._has_time, self._limit_s)

    def _best_s(self, plan: StepPlan, *, is_checked: bool = False) -> float:
        """Returns the seconds of the faster of two runs, or of one where time is up, unless it is
        to be checked by a second."""
        first_s = self._run(plan)
        if not is_checked and not self._has_time():
            return first_s
        second_s = self._run(plan)
        self._is_steady &= abs(first_s - second_s) <= AGREEMENT * max(first_s, second_s)
        return min(first_s, second_s)

    def _run(self, plan: StepPlan) -> float:
        begun = time.perf_counter()
        outcome = self._forward.run(plan, mx.ones((plan.num_tokens,), mx.int32))
        mx.eval(outcome.result, *outcome.beside)
        return time.perf_counter() - begun


def fastest_threads(
    most: int, time_s: Callable[[int], float], has_time: Callable[[], bool] = lambda: True
) -> int:
    """Returns as many threads as are free: with other work on the machine, the threads of a BLAS
    wait for each other at every product, and fewer are faster. What disturbs for a moment decides
    nothing: fewer have to be faster each time."""
    choices: Sequence[int] = sorted({most, max(1, most - 1), max(1, most // 2)}, reverse=True)
    fastest = most
    for trial in range(THREAD_TRIALS if len(choices) > 1 else 0):
        if trial and not has_time():
            break
        fastest = min(choices, key=time_s)
        if fastest == most:
            break
    return fastest
