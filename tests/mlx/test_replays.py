"""A replayed forward gives the numbers that a built one gives, whatever the step holds."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import mlx.core as mx
import pytest

from mlx_lm_server.core.plan import CreateSlab, DropSlab, RowWork, StepPlan
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.loading import loader, probe
from mlx_lm_server.runner.seam import replays
from mlx_lm_server.runner.seam.forwards import PackedForward
from mlx_lm_server.runner.state.kv_storage import KVStorage
from tests.back_ends import BACKEND

from .tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.skipif(
    not native_products.is_there(), reason="needs the attention in C, on an x86 CPU"
)

CAPACITY = 96
# Rows by slab and slot: two slabs of one shape, so that a step in the second replays the first's.
PLACES = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}

Forward = Callable[[], PackedForward]


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text", "gemma4_text", "gpt_oss"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forward:
    """Forwards of one model, each with slabs of its own. The last three have windows: of rings
    alone with sinks, and of layers that share K and V."""
    folder = write_model(request.param, tmp_path_factory.mktemp("replays") / request.param)
    order = LoadModel(str(folder))
    loaded = loader.load(order, BACKEND, lambda _stage, _fraction: None)
    state = loaded.state
    assert state is not None

    def forward() -> PackedForward:
        storage = KVStorage(state.kv, BACKEND)
        made = PackedForward(loaded.lm, state, storage, BACKEND.kernel(loaded.kv_dtype))
        for slab_id in (0, 1):
            storage.apply(CreateSlab(slab_id, 2, CAPACITY))
        storage.stages.run()
        return made

    return forward


def built(make: Forward) -> PackedForward:
    forward = make()
    assert forward.replays is not None
    forward.replays = None
    return forward


def traces_of(forward: PackedForward) -> int:
    assert forward.replays is not None
    return forward.replays.num_traces


class Rows:
    """Rows that grow, and the plans in which they do."""

    def __init__(self) -> None:
        self._rng = Random(5)
        self._lengths = dict.fromkeys(PLACES, 0)

    def plan(self, decoding: tuple[int, ...], chunks: dict[int, int], samples: bool) -> StepPlan:
        decodes = tuple(RowWork(row, *PLACES[row], self._grow(row, 1)) for row in decoding)
        prefills = tuple(
            RowWork(row, *PLACES[row], self._grow(row, n), self._ids(n), int(samples))
            for row, n in chunks.items()
        )
        return StepPlan(0, (), (), (), decodes, prefills)

    def ids_of(self, plan: StepPlan) -> mx.array:
        known = [token for chunk in plan.chunks for token in chunk.token_ids]
        return mx.array([*self._ids(len(plan.decodes)), *known], mx.int32)

    def _grow(self, row: int, num_tokens: int) -> int:
        start = self._lengths[row]
        self._lengths[row] += num_tokens
        return start

    def _ids(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def same(forwards: tuple[PackedForward, ...], plan: StepPlan, ids: mx.array) -> bool:
    results = [forward.run(plan, ids) for forward in forwards]
    for result in results:
        mx.eval(result.result, *result.beside)
    one, other = (result.result for result in results)
    return bool(mx.array_equal(one, other))


def test_replayed_forwards_give_the_very_numbers_of_built_ones(make: Forward) -> None:
    """Rows of different lengths decode and read prompts in chunks of one size, in turn, so that
    each form comes at other positions, in other slots, and in the other slab."""
    forwards = make(), built(make)
    rows = Rows()
    steps: list[tuple[tuple[int, ...], dict[int, int], bool]] = [((), {0: 5, 1: 9}, True)]
    steps += [((), {2: 3, 3: 8}, True)]
    steps += [((0, 1), {}, True), ((2, 3), {}, True)] * replays.TIMES_BUILT
    steps += [((0, 2), {}, True), ((1, 3), {}, True), ((0, 1, 2, 3), {}, True)] * 6
    steps += [((0,), {1: 6}, True), ((2,), {3: 6}, True), ((1,), {0: 6}, False)] * 3
    for decoding, chunks, samples in steps:
        plan = rows.plan(decoding, chunks, samples)
        assert same(forwards, plan, rows.ids_of(plan)), plan
    has_rings = any(layer.ring for layer in forwards[0].storage.layers)
    assert traces_of(forwards[0]) == (3 if has_rings else 4)  # chunks in rings are built


def test_a_form_is_traced_once_it_was_built_a_few_times(make: Forward) -> None:
    forward, rows = make(), Rows()
    for times in range(1, replays.TIMES_BUILT + 2):
        plan = rows.plan((0, 3), {}, True)
        mx.eval(forward.run(plan, rows.ids_of(plan)).result)
        assert traces_of(forward) == (times >= replays.TIMES_BUILT)


def test_traces_and_what_was_seen_are_bounded(
    make: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "MAX_TRACES", 2)
    forwards = make(), built(make)
    rows = Rows()
    for _ in range(3):
        for decoding in ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)):
            for _ in range(replays.TIMES_BUILT + 1):
                plan = rows.plan(decoding, {}, True)
                assert same(forwards, plan, rows.ids_of(plan))
        assert traces_of(forwards[0]) == 2


def test_a_slab_of_the_same_shape_takes_the_place_of_one_that_is_gone(make: Forward) -> None:
    """A trace holds nothing of the slabs that it was made with."""
    forwards = make(), built(make)
    for _ in range(3):
        rows = Rows()
        for _ in range(replays.TIMES_BUILT + 1):
            plan = rows.plan((0, 1), {}, True)
            assert same(forwards, plan, rows.ids_of(plan))
        for forward in forwards:
            forward.storage.apply(DropSlab(0))
            forward.storage.apply(CreateSlab(0, 2, CAPACITY))
            forward.storage.stages.run()


def test_a_model_that_cannot_be_traced_is_built(
    make: Forward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails in a trace leaves the slabs as they were."""
    forwards = make(), built(make)
    rows = Rows()
    sealed = replays.StepLayout.sealed
    monkeypatch.setattr(replays.StepLayout, "sealed", lambda layout, _arrays: sealed(layout, {}))
    for _ in range(replays.TIMES_BUILT + 2):
        plan = rows.plan((0, 1), {}, True)
        assert same(forwards, plan, rows.ids_of(plan))
    assert "built anew" in caplog.text
    assert len(caplog.records) == 1


def test_replays_that_round_otherwise_are_not_used(
    make: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = make()
    probe.check_replays(forward, forward.storage)
    assert forward.replays is not None
    run = replays._Trace.__call__
    monkeypatch.setattr(
        replays._Trace, "__call__", lambda *step: run(*step) * mx.array(1.0 + 2.0**-23)
    )
    forward = make()
    probe.check_replays(forward, forward.storage)
    assert forward.replays is None
