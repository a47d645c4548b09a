"""One look at an engine in one way, in a process of its own: TASK and what is printed are JSON.

python -m benchmarks.device_child TASK
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_lm_server.config import Way
from mlx_lm_server.protocol import AddRequest, LoadModel, SamplingParams

if TYPE_CHECKING:
    from mlx_lm_server.engine.engine_core import EngineCore
    from mlx_lm_server.runner.backends.blas import Blas

# Tells when it is ready what was measured.
TELLS = "mlx_lm_server.engine.assembly"
SHORT_PROMPTS = (5, 40, 17)
WARM_STEPS, PEAK_STEPS = 6, 12
MAX_TOKENS = 100_000
MEMORY_LIMIT_BYTES = 4 << 30


class Task(msgspec.Struct, frozen=True):
    """Tokens are of a greedy answer to each short prompt. Each number of `rows` is timed for so
    many steps, over prompts of so many tokens. `way` None is the device's own; `submission` is
    asked for where an engine can be asked."""

    model: str
    way: Way | None = None
    kv_bits: int = 16
    submission: str | None = None
    num_tokens: int = 0
    rows: tuple[int, ...] = ()
    prompt_tokens: int = 256
    num_steps: int = 32


class Decode(msgspec.Struct, frozen=True):
    """Steps of so many rows. The peak is memory that a step takes beyond what is held, the gap
    lies between the end of a forward and the beginning of the next one's submission, as the host
    sees both: medians."""

    num_rows: int
    tokens_per_s: float
    step_s: float
    gap_s: float
    submit_s: float
    peak_bytes: int
    slab_bytes: int


class Seen(msgspec.Struct, frozen=True):
    """What one engine showed. `facts` are MLX's of the device, `told` what was logged at load."""

    way: str
    device: str
    kv_format: str
    weights: str
    batching: str
    submission: str | None
    facts: dict[str, str | int]
    told: list[str]
    tokens: list[list[int]]
    decodes: list[Decode]


class Gap(msgspec.Struct, frozen=True):
    waited_s: float
    submitted_s: float


def can_be_asked(field: str) -> bool:
    """Whether an engine can be told this when it is loaded."""
    return field in LoadModel.__struct_fields__


def look(task: Task, blas: Blas) -> Seen:
    """Loads an engine and runs what the task asks for."""
    import mlx.core as mx

    from mlx_lm_server.engine.assembly import assemble

    with logged() as told:
        core, ready = assemble(_order(task), blas, lambda _stage, _fraction: None)
    return Seen(
        way=ready.way,
        device=ready.device,
        kv_format=ready.kv_format,
        weights=ready.weights,
        batching=ready.batching,
        submission=getattr(ready, "submission", None),
        facts=dict(mx.device_info()),
        told=told,
        tokens=_tokens(core, task, ready.vocab_size) if task.num_tokens else [],
        decodes=[decode(core, task, num_rows, ready.vocab_size) for num_rows in task.rows],
    )


def _order(task: Task) -> LoadModel:
    more: dict[str, Any] = {}
    if task.submission is not None and can_be_asked("submission"):
        more["submission"] = task.submission
    return LoadModel(
        task.model,
        way=task.way,
        kv_bits=task.kv_bits,
        itl_goal_s=60.0,  # rows come together
        memory_limit_bytes=MEMORY_LIMIT_BYTES,
        keeps_profile=False,
        **more,
    )


@contextmanager
def logged() -> Iterator[list[str]]:
    """Keeps what is told at load, as long as it is."""
    told: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(without_folders(record.getMessage()))

    log, keeper = logging.getLogger(TELLS), Keeper()
    level = log.level
    log.addHandler(keeper)
    log.setLevel(logging.INFO)
    try:
        yield told
    finally:
        log.removeHandler(keeper)
        log.setLevel(level)


def without_folders(line: str) -> str:
    """Returns a line that may be shown to anybody: words that name a folder are left out."""
    return " ".join("…" if "/" in word or "\\" in word else word for word in line.split())


def _prompts(lengths: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    rng = Random(f"{lengths}")
    return [[rng.randrange(vocab_size // 16, vocab_size) for _ in range(n)] for n in lengths]


def _tokens(core: EngineCore, task: Task, vocab_size: int) -> list[list[int]]:
    sampling = SamplingParams(task.num_tokens, seed=0, temperature=0.0)
    prompts = _prompts(SHORT_PROMPTS, vocab_size)
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    core.handle(AddRequest(name, prompts[int(name)], sampling) for name in found)
    while core.has_work:
        for output in core.step():
            found[output.req_id] += output.token_ids
    return list(found.values())


def decode(core: EngineCore, task: Task, num_rows: int, vocab_size: int) -> Decode:
    import mlx.core as mx

    from mlx_lm_server.protocol import Abort

    names = [f"{num_rows}-{row}" for row in range(num_rows)]
    sampling = SamplingParams(MAX_TOKENS, seed=0, temperature=0.0)
    prompts = _prompts((task.prompt_tokens,) * num_rows, vocab_size)
    core.handle(map(AddRequest, names, prompts, [sampling] * num_rows))
    started: set[str] = set()
    while len(started) < num_rows:
        started |= {output.req_id for output in core.step()}
    for _ in range(WARM_STEPS):
        core.step()
    begun_s = perf_counter()
    num_tokens = sum(len(output.token_ids) for _ in range(task.num_steps) for output in core.step())
    taken_s = perf_counter() - begun_s
    gaps = _gaps(core, task.num_steps)
    peaks = []
    for _ in range(PEAK_STEPS):
        mx.reset_peak_memory()
        held_bytes = mx.get_active_memory()
        core.step()
        peaks.append(mx.get_peak_memory() - held_bytes)
    slab_bytes = core.stats().kv_used_bytes
    core.handle(map(Abort, names))
    while core.has_work:
        core.step()
    return Decode(
        num_rows,
        tokens_per_s=num_tokens / taken_s,
        step_s=taken_s / task.num_steps,
        gap_s=median(gap.waited_s for gap in gaps),
        submit_s=median(gap.submitted_s for gap in gaps),
        peak_bytes=int(median(peaks)),
        slab_bytes=slab_bytes,
    )


def _gaps(core: EngineCore, num_steps: int) -> list[Gap]:
    with gaps_noted() as gaps:
        for _ in range(num_steps):
            core.step()
    return gaps


@contextmanager
def gaps_noted() -> Iterator[list[Gap]]:
    """Keeps the time from the first wait that ended to the next submission, each time. A draw is
    submitted while nobody has waited, and so leaves no gap."""
    import mlx.core as mx

    gaps: list[Gap] = []
    plain_eval, plain_async_eval = mx.eval, mx.async_eval
    ended_s: float | None = None

    def noting_eval(*arrays: Any) -> None:
        nonlocal ended_s
        plain_eval(*arrays)
        ended_s = perf_counter() if ended_s is None else ended_s

    def noting_async_eval(*arrays: Any) -> None:
        nonlocal ended_s
        begun_s = perf_counter()
        plain_async_eval(*arrays)
        if ended_s is not None:
            gaps.append(Gap(begun_s - ended_s, perf_counter() - begun_s))
            ended_s = None

    mx.eval, mx.async_eval = noting_eval, noting_async_eval
    try:
        yield gaps
    finally:
        mx.eval, mx.async_eval = plain_eval, plain_async_eval


def main(task: str) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not answer
    from mlx_lm_server.runner.backends import blas

    chosen = blas.preload()
    answers.write(msgspec.json.encode(look(msgspec.json.decode(task, type=Task), chosen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
