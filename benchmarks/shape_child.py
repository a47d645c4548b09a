"""The steps of one contender, counted, in a process of its own; prints JSON.

python -m benchmarks.shape_child CONTENDER FOLDER TASK

CONTENDER is `mlx-lm` or a way and bits, such as `metal-8`; FOLDER has the models; TASK is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median_low
from time import thread_time
from typing import TYPE_CHECKING, Literal, Protocol, cast

import msgspec

from benchmarks.shape_models import VOCAB_SIZE, name_of
from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.plan import StepPlan
from mlx_lm_server.engine.assembly import assemble
from mlx_lm_server.engine.engine_core import Handle
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
# What happens to rows now and then is counted over so many steps, the first of which shows it.
EVENT_STEPS = 4
MAX_STEPS_TO_GROWTH = 3000
MEMORY_LIMIT_BYTES = 4 << 30
# So few that rows do not get room for long answers at once, but grow.
FEW_KV_TOKENS = 16384
# Plans are those of any machine.
MEASURED = Measured(None, StepCosts(), ForwardBytes(100_000), 1e9)

Kind = Literal["greedy", "top-p", "penalties"]
Event = Literal["leaving", "growing"]
SAMPLING: dict[Kind, SamplingParams] = {
    "greedy": SamplingParams(MAX_TOKENS, seed=0, temperature=0.0),
    "top-p": SamplingParams(MAX_TOKENS, seed=0, temperature=0.7, top_p=0.95),
    "penalties": SamplingParams(
        MAX_TOKENS, seed=0, temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5
    ),
}


class Load(msgspec.Struct, frozen=True):
    """Rows that decode. With `has_chunk` a chunk of another one's prompt is computed in each
    step. With an event those steps are counted together in which it happens to one row."""

    num_rows: int
    is_ragged: bool = False
    has_chunk: bool = False
    sampling: Kind = "greedy"
    event: Event | None = None

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
    is_timed: bool = True


class Shape(msgspec.Struct, frozen=True):
    """One step, or those of an event, of a model with so many layers. `host_ms` is the least time
    that its thread computes, 0 where it is not timed; `num_attentions` counts calls."""

    load: Load
    num_layers: int
    nodes: int
    kernels: int
    submissions: int
    waits: int
    kv_bytes: int
    written_bytes: int
    copied_bytes: int
    num_attentions: int
    host_ms: float
    names: dict[str, int]


class Contender(Protocol):
    def begin(self, load: Load) -> None:
        """Goes on until all rows decode."""

    def add_long(self, prompt: list[int]) -> None: ...

    def step(self) -> None: ...

    def leave(self) -> None:
        """Lets the first row end."""

    def until_growth(self) -> AbstractContextManager[Counts]:
        """Goes on to the step in which a row gets more room, and counts from then on."""

    def end(self) -> None: ...


class Ours:
    """`EngineCore` stepped by hand."""

    def __init__(self, way: Way, kv_bits: int, model: Path, max_kv_tokens: int | None) -> None:
        order = LoadModel(
            str(model),
            way=way,
            kv_bits=kv_bits,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
            prefill_step_size=CHUNK_TOKENS,
            max_batch_size=33,
            max_kv_tokens=max_kv_tokens,
            itl_goal_s=60.0,
            keeps_profile=False,
            submission="late",
        )
        self._time_s = 0.0
        self._core, ready = assemble(
            order, Blas("any"), lambda _stage, _fraction: None, self._clock, measured=MEASURED
        )
        if ready.batching != "packed" or ready.kv_bits != kv_bits:
            raise RuntimeError(f"runs {ready.batching} with {ready.kv_format}: {ready}")
        self._names: list[str] = []
        self._num_begun = 0

    def _clock(self) -> float:
        """Returns a time that has nothing to do with how fast this machine is."""
        self._time_s += 0.001
        return self._time_s

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

    def leave(self) -> None:
        self._core.handle([Abort(self._names[0])])

    @contextmanager
    def until_growth(self) -> Iterator[Counts]:
        from benchmarks.graphs import counting

        runner = self._core._runner
        submit = runner.submit
        found: list[Counts] = []
        with ExitStack() as stack:

            def submit_watched(plan: StepPlan) -> Handle:
                if plan.kv_ops and not found:
                    found.append(stack.enter_context(counting()))
                return submit(plan)

            setattr(runner, "submit", submit_watched)  # noqa: B010
            for _ in range(MAX_STEPS_TO_GROWTH):
                self.step()
                if found:
                    break
            setattr(runner, "submit", submit)  # noqa: B010
            yield found[0]

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
        self._uids = self._generator.insert(
            prompts,
            [MAX_TOKENS] * len(prompts),
            samplers=[make_sampler(asked.temperature, asked.top_p) for _ in prompts],
            logits_processors=[penalties for _ in prompts],
        )

    def step(self) -> None:
        self._generator.next()

    def leave(self) -> None:
        self._generator.remove([self._uids[0]])

    @contextmanager
    def until_growth(self) -> Iterator[Counts]:
        """Its caches grow in the steps that have more to compute than the one before."""
        from benchmarks.graphs import counting

        before: Counts | None = None
        for _ in range(MAX_STEPS_TO_GROWTH):
            with counting() as counts:
                self.step()
                if before and counts.copied_bytes > 2 * before.copied_bytes:
                    yield counts
                    return
            before = counts
        raise RuntimeError("no row has grown")

    def end(self) -> None:
        self._generator.close()


@dataclass(frozen=True, slots=True)
class _Steps:
    counts: list[Counts]
    host_s: list[float]


Make = Callable[[Path, int | None], Contender]


def shapes(make: Make, folder: Path, task: Task) -> Iterator[Shape]:
    for num_layers in task.layers:
        model, contender = folder / name_of(num_layers), None
        for load in task.loads:
            if load.event == "growing":
                contender = make(model, FEW_KV_TOKENS)
            elif contender is None:
                contender = make(model, None)
            contender.begin(load)
            if load.has_chunk:
                contender.add_long(_long_prompt(load))
            if load.event is None:
                steps = _steps(contender, is_timed=task.is_timed)
                yield _shape(load, num_layers, _usual(load, steps.counts), min(steps.host_s))
            else:
                yield _shape(load, num_layers, _of_event(contender, load.event))
            contender.end()


def _long_prompt(load: Load) -> list[int]:
    """Another one for each load, so that none is found in the prefix cache."""
    rng = Random(f"{load} and a long prompt")
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(LONG_TOKENS)]


def _of_event(contender: Contender, event: Event) -> Counts:
    from benchmarks.graphs import counting, one_node_each

    for _ in range(WARM_STEPS):
        contender.step()
    with one_node_each():
        contender.step()  # submits what was built before
        if event == "growing":
            with contender.until_growth() as counts:
                for _ in range(EVENT_STEPS - 1):
                    contender.step()
        else:
            contender.leave()
            with counting() as counts:
                for _ in range(EVENT_STEPS):
                    contender.step()
    return counts


def _steps(contender: Contender, *, is_timed: bool) -> _Steps:
    from benchmarks.graphs import counting, one_node_each

    for _ in range(WARM_STEPS):
        contender.step()
    counts, host_s = [], [] if is_timed else [0.0]
    with one_node_each():
        contender.step()  # submits what was built before
        for _ in range(COUNTED_STEPS):
            with counting() as counted:
                contender.step()
            counts.append(counted)
        for _ in range(TIMED_STEPS if is_timed else 0):
            begun = thread_time()
            contender.step()
            host_s.append(thread_time() - begun)
    return _Steps(counts, host_s)


def _usual(load: Load, steps: list[Counts]) -> Counts:
    """Returns the usual step: now and then one does more, such as making a slab larger."""
    usual = median_low([counts.num_nodes for counts in steps])
    counts = next(counts for counts in steps if counts.num_nodes == usual)
    if bool(counts.num_chunk_attentions) != load.has_chunk:
        raise RuntimeError(f"{load} had {counts.num_chunk_attentions} attentions over chunks")
    return counts


def _shape(load: Load, num_layers: int, counts: Counts, host_s: float = 0.0) -> Shape:
    return Shape(
        load,
        num_layers,
        nodes=counts.num_nodes,
        kernels=counts.num_kernels,
        submissions=counts.num_submissions,
        waits=counts.num_waits,
        kv_bytes=counts.kv_bytes,
        written_bytes=counts.written_bytes,
        copied_bytes=counts.copied_bytes,
        num_attentions=counts.num_decode_attentions + counts.num_chunk_attentions,
        host_ms=1000 * host_s,
        names=dict(counts.nodes.most_common()),
    )


def contender_of(name: str) -> Make:
    if name == "mlx-lm":
        return lambda model, _: MlxLm(model)
    way, _, bits = name.partition("-")
    return partial(Ours, cast(Way, way), int(bits))


def main(name: str, folder: str, task: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    decoded = msgspec.json.decode(task, type=Task)
    found = list(shapes(contender_of(name), Path(folder), decoded))
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
