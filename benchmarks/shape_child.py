"""The steps of one contender, counted, in a process of its own; prints JSON.

python -m benchmarks.shape_child CONTENDER FOLDER TASK

CONTENDER is `mlx-lm` or a way and bits, such as `metal-8`; FOLDER has the models; TASK is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median_low
from time import thread_time
from typing import TYPE_CHECKING, Literal, Protocol, cast

import msgspec

from benchmarks.shape_models import VOCAB_SIZE, name_of
from mlx_lm_server.engine.assembly import assemble
from mlx_lm_server.protocol import Abort, AddRequest, LoadModel, SamplingParams, Way
from mlx_lm_server.runner.backends.blas import Blas

if TYPE_CHECKING:
    from benchmarks.graphs import Counts

EQUAL_TOKENS = 100
DIFFERENT_TOKENS = 24, 1200
# Long enough that no step to be counted is the prompt's last.
LONG_TOKENS, CHUNK_TOKENS = 4096, 128
MAX_TOKENS = 100_000
# Steps that are run before any is counted, and then counted and timed.
WARM_STEPS, COUNTED_STEPS, TIMED_STEPS = 4, 5, 15
MAX_WARM_STEPS = 1000
MEMORY_LIMIT_BYTES = 4 << 30

Kind = Literal["greedy", "top-p", "penalties"]
SAMPLING: dict[Kind, SamplingParams] = {
    "greedy": SamplingParams(MAX_TOKENS, seed=0, temperature=0.0),
    "top-p": SamplingParams(MAX_TOKENS, seed=0, temperature=0.7, top_p=0.95),
    "penalties": SamplingParams(
        MAX_TOKENS, seed=0, temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5
    ),
}


class Load(msgspec.Struct, frozen=True):
    """Rows that decode. With `has_chunk` a chunk of another one's prompt is computed in each
    step."""

    num_rows: int
    is_ragged: bool = False
    has_chunk: bool = False
    sampling: Kind = "greedy"

    @property
    def prompts(self) -> list[list[int]]:
        rng = Random(f"{self}")
        return [[rng.randrange(1, VOCAB_SIZE) for _ in range(n)] for n in self._lengths]

    @property
    def _lengths(self) -> list[int]:
        if not self.is_ragged:
            return [EQUAL_TOKENS] * self.num_rows
        shortest, longest = DIFFERENT_TOKENS
        growth = (longest / shortest) ** (1 / max(1, self.num_rows - 1))
        lengths = [round(shortest * growth**i) for i in range(self.num_rows)]
        Random(self.num_rows).shuffle(lengths)
        return lengths


class Task(msgspec.Struct, frozen=True):
    """Each load with a model of so many layers each."""

    layers: tuple[int, ...]
    loads: list[Load]


class Shape(msgspec.Struct, frozen=True):
    """One step, of a model with so many layers. `host_ms` is the least time that its
    thread computes; `num_attentions` counts calls."""

    load: Load
    num_layers: int
    nodes: int
    kernels: int
    submissions: int
    kv_bytes: int
    num_attentions: int
    host_ms: float
    names: dict[str, int]


class Contender(Protocol):
    def begin(self, load: Load) -> None:
        """Goes on until all rows decode."""

    def add_long(self, prompt: list[int]) -> None: ...

    def step(self) -> None: ...

    def end(self) -> None: ...


class Ours:
    """`EngineCore` stepped by hand."""

    def __init__(self, way: Way, kv_bits: int, model: Path) -> None:
        order = LoadModel(
            str(model),
            way=way,
            kv_bits=kv_bits,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
            prefill_step_size=CHUNK_TOKENS,
            max_batch_size=33,
            itl_goal_s=60.0,
            keeps_profile=False,
            submission="late",
        )
        self._core, ready = assemble(order, Blas("any"), lambda _stage, _fraction: None)
        if ready.batching != "packed" or ready.kv_bits != kv_bits:
            raise RuntimeError(f"runs {ready.batching} with {ready.kv_format}: {ready}")
        self._names: list[str] = []
        self._num_begun = 0

    def begin(self, load: Load) -> None:
        decoding: set[str] = set()
        for prompt in load.prompts:
            self._add(prompt, load.sampling)
        for _ in range(MAX_WARM_STEPS):
            decoding |= {output.req_id for output in self._core.step()}
            if len(decoding) == load.num_rows:
                return
        raise RuntimeError("not all rows decode")

    def add_long(self, prompt: list[int]) -> None:
        self._add(prompt, "greedy")

    def _add(self, prompt: list[int], kind: Kind) -> None:
        name = str(self._num_begun)
        self._num_begun += 1
        sampling = msgspec.structs.replace(SAMPLING[kind], seed=self._num_begun)
        self._names.append(name)
        self._core.handle([AddRequest(name, prompt, sampling)])

    def step(self) -> None:
        self._core.step()

    def end(self) -> None:
        self._core.handle(Abort(name) for name in self._names)
        self._names.clear()
        while self._core.has_work:
            self._core.step()


class MlxLm:
    """mlx-lm's `BatchGenerator`, set up as `mlx_lm.server` does: each row has its own sampler."""

    def __init__(self, model: Path) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(model)

    def begin(self, load: Load) -> None:
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(
            self._model, completion_batch_size=33, prefill_step_size=CHUNK_TOKENS
        )
        self._insert(load.prompts, load.sampling)
        for _ in range(MAX_WARM_STEPS):
            _, responses = self._generator.next()
            if len(responses) == load.num_rows:
                return
        raise RuntimeError("not all rows decode")

    def add_long(self, prompt: list[int]) -> None:
        self._insert([prompt], "greedy")

    def _insert(self, prompts: list[list[int]], kind: Kind) -> None:
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        asked = SAMPLING[kind]
        penalties = make_logits_processors(
            repetition_penalty=None if asked.repetition_penalty == 1 else asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
        )
        self._generator.insert(
            prompts,
            [MAX_TOKENS] * len(prompts),
            samplers=[make_sampler(asked.temperature, asked.top_p) for _ in prompts],
            logits_processors=[penalties for _ in prompts],
        )

    def step(self) -> None:
        self._generator.next()

    def end(self) -> None:
        self._generator.close()


@dataclass(frozen=True, slots=True)
class _Steps:
    counts: list[Counts]
    host_s: list[float]


def shapes(make: Callable[[Path], Contender], folder: Path, task: Task) -> Iterator[Shape]:
    for num_layers in task.layers:
        contender = make(folder / name_of(num_layers))
        for load in task.loads:
            contender.begin(load)
            if load.has_chunk:
                contender.add_long(_long_prompt(load))
            steps = _steps(contender)
            contender.end()
            yield _shape(load, num_layers, steps)


def _long_prompt(load: Load) -> list[int]:
    """Another one for each load, so that none is found in the prefix cache."""
    rng = Random(f"{load} and a long prompt")
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(LONG_TOKENS)]


def _steps(contender: Contender) -> _Steps:
    from benchmarks.graphs import counting, one_node_each

    for _ in range(WARM_STEPS):
        contender.step()
    counts, host_s = [], []
    with one_node_each():
        contender.step()  # submits what was built before
        for _ in range(COUNTED_STEPS):
            with counting() as counted:
                contender.step()
            counts.append(counted)
        for _ in range(TIMED_STEPS):
            begun = thread_time()
            contender.step()
            host_s.append(thread_time() - begun)
    return _Steps(counts, host_s)


def _shape(load: Load, num_layers: int, steps: _Steps) -> Shape:
    """The usual step: now and then one does more, such as making a slab larger."""
    usual = median_low([counts.num_nodes for counts in steps.counts])
    counts = next(counts for counts in steps.counts if counts.num_nodes == usual)
    if bool(counts.num_chunk_attentions) != load.has_chunk:
        raise RuntimeError(f"{load} had {counts.num_chunk_attentions} attentions over chunks")
    return Shape(
        load,
        num_layers,
        nodes=usual,
        kernels=counts.num_kernels,
        submissions=counts.num_submissions,
        kv_bytes=counts.kv_bytes,
        num_attentions=counts.num_decode_attentions + counts.num_chunk_attentions,
        host_ms=1000 * min(steps.host_s),
        names=dict(counts.nodes.most_common()),
    )


def contender_of(name: str) -> Callable[[Path], Contender]:
    if name == "mlx-lm":
        return MlxLm
    way, _, bits = name.partition("-")
    return lambda model: Ours(cast(Way, way), int(bits), model)


def main(name: str, folder: str, task: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    decoded = msgspec.json.decode(task, type=Task)
    found = list(shapes(contender_of(name), Path(folder), decoded))
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
