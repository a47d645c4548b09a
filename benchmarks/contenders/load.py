"""What a contender is asked to do and what came of it; also the messages between processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Protocol

import msgspec

from mlx_lm_server.protocol import SamplingParams


class Load(msgspec.Struct, frozen=True):
    """`prompt_tokens[i]` tokens for row i, `output_tokens` out of each. With `own_sampling` each
    row has its own temperature, top_p and seed. The first `num_scored` rows ask for logprobs and
    five alternatives. `num_in_flight` 0: all at once; else a row that
    ends makes place for the next."""

    prompt_tokens: tuple[int, ...]
    output_tokens: int
    seed: int
    own_sampling: bool = False
    num_in_flight: int = 0
    num_scored: int = 0

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of words only, other ones for every load."""
        rng = Random(f"{self.seed}/prompts")
        return [[rng.randrange(300, 8000) for _ in range(n)] for n in self.prompt_tokens]

    @property
    def sampling(self) -> list[SamplingParams]:
        rng = Random(f"{self.seed}/sampling")
        found = [self._sampling_of(rng) for _ in self.prompt_tokens]
        for row in range(self.num_scored):
            found[row] = msgspec.structs.replace(found[row], logprobs=5)
        return found

    def _sampling_of(self, rng: Random) -> SamplingParams:
        if not self.own_sampling:
            return SamplingParams(self.output_tokens, seed=0, temperature=0.0)
        return SamplingParams(
            self.output_tokens,
            seed=rng.randrange(2**63),
            temperature=rng.uniform(0.5, 1.2),
            top_p=rng.uniform(0.8, 0.98),
        )


class Measured(msgspec.Struct, frozen=True):
    """`decode_…` is over the time in which all rows decode: from the last row's first token to the
    first row's last. `step_cpu_p50_s` is the CPU time of a step, all threads of the process: what
    to compare on a busy machine. Bytes: see `Contender`."""

    total_s: float
    total_tokens: int
    prompt_tokens: int
    decode_s: float
    decode_tokens: int
    step_p50_s: float
    step_cpu_p50_s: float
    peak_bytes: int
    live_kv_bytes: int

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of a load with one token out per row."""
        return self.prompt_tokens / self.total_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.total_tokens / self.total_s


class About(msgspec.Struct, frozen=True):
    """What a contender says before its first load: its BLAS, and how it runs rows together."""

    blas: str
    runs: str


class Contender(Protocol):
    """Runs loads; a bare loop may ignore sampling. `kv_bytes_per_token` 0 where it is unknown."""

    runs: str
    kv_bytes_per_token: int

    def generate(self, load: Load) -> Iterator[list[int]]:
        """The rows that got a token, step by step."""
        ...


class Memory(Protocol):
    """The counters of the device's allocator, in bytes."""

    def get_active_memory(self) -> int: ...

    def get_peak_memory(self) -> int: ...

    def reset_peak_memory(self) -> None: ...


def measure(contender: Contender, load: Load, memory: Memory) -> Measured:
    """Run one load and time it. The peak is of the time in which all rows decode, without what
    was held before the load and what a prefix cache keeps after it."""
    counts = [0] * len(load.prompt_tokens)
    steps: list[tuple[float, float, int]] = []  # of the time in which all rows decode
    total_tokens = peak_bytes = 0
    held_bytes = memory.get_active_memory()
    begun = perf_counter()
    for rows in contender.generate(load):
        now, cpu = perf_counter(), process_time()
        is_full = min(counts) > 0 and max(counts) < load.output_tokens
        for row in rows:
            counts[row] += 1
        total_tokens += len(rows)
        if is_full:
            steps.append((now, cpu, len(rows)))
            peak_bytes = memory.get_peak_memory() - held_bytes
        elif min(counts) > 0 and not steps:
            memory.reset_peak_memory()
            steps.append((now, cpu, 0))
    total_s = perf_counter() - begun
    times = [time for time, _, _ in steps]
    decode_tokens = sum(num for _, _, num in steps)
    live_tokens = sum(load.prompt_tokens) + total_tokens
    return Measured(
        total_s=total_s,
        total_tokens=total_tokens,
        prompt_tokens=sum(load.prompt_tokens),
        decode_s=times[-1] - times[0] if times else 0.0,
        decode_tokens=decode_tokens,
        step_p50_s=_median_gap(times),
        step_cpu_p50_s=_median_gap([cpu for _, cpu, _ in steps]),
        peak_bytes=peak_bytes,
        live_kv_bytes=live_tokens * contender.kv_bytes_per_token,
    )


def _median_gap(times: list[float]) -> float:
    return median(after - before for before, after in pairwise(times)) if times[1:] else 0.0
