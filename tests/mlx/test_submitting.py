"""Forwards that are submitted early give the tokens of those that are submitted late."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.plan import StepPlan, StepResult
from mlx_lm_server.core.submitting import ALWAYS, NEVER, EarlySteps
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.loading.both_ways import SMALL_CAPACITY, BothWays
from mlx_lm_server.runner.model_runner import ModelRunner
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from tests.back_ends import BACKEND, IS_X86
from tests.observations import observes

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.each_way

# Where the machine's own way has none, the early way is tried as another device would go it.
WAY = "metal" if IS_X86 else BACKEND.policy.way
FAMILIES = ("qwen3", "gemma2", "qwen3_next", "deepseek_v3")
Job = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(family, root / family) for family in FAMILIES}


class Engine(EngineDriver):
    """Counts the steps that were submitted beside another."""

    def __init__(self, model: Path, submission: str, **order: Any) -> None:
        fixed = {"way": WAY, "kv_bits": 16, "itl_goal_s": 60.0}  # chunks of one size
        super().__init__(model, submission=submission, **fixed, **order)
        runner = self.core._runner
        assert isinstance(runner, ModelRunner)
        self.num_early = 0
        submit = runner._submit

        def watched(step: Any) -> None:
            self.num_early += runner._under_way is not None
            submit(step)

        runner._submit = watched  # type: ignore[method-assign]


def jobs(seed: int, lengths: Sequence[int]) -> list[Job]:
    """Prompts with all kinds of sampling, of answers of different lengths."""
    rng = random.Random(seed)
    kinds = [
        SamplingParams(24, seed=0, temperature=0.0),
        SamplingParams(24, seed=1, temperature=0.9, top_p=0.9),
        SamplingParams(24, seed=2, temperature=1.0, top_k=20, frequency_penalty=0.7),
        SamplingParams(24, seed=3, temperature=0.0, repetition_penalty=1.3, logprobs=2),
        SamplingParams(24, seed=4, temperature=0.8, bad_words=((5, 6), (7,)), logit_bias={9: 2.0}),
    ]
    prompts = random_prompts(seed, lengths, VOCAB_SIZE)
    return [
        (prompt, replace(kinds[i % len(kinds)], max_tokens=rng.randrange(3, 40)))
        for i, prompt in enumerate(prompts)
    ]


def joining(engine: EngineDriver, jobs: Sequence[Job]) -> list[list[int]]:
    """The answers of requests that come one by one while others run."""
    for number, (prompt, sampling) in enumerate(jobs):
        engine.add(str(number), prompt, sampling)
        for _ in range(3):
            engine.step()
    engine.finish()
    return [engine.tokens[str(number)] for number in range(len(jobs))]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_grow_and_leave_get_the_same_tokens_early_and_late(
    family: str, folders: dict[str, Path]
) -> None:
    """The slabs are made larger and smaller, rows wait for a place, and their blocks are kept."""
    work = jobs(1, [5, 300, 17, 40, 3, 90, 64, 7, 250, 30])
    late, early = (
        Engine(folders[family], submission, max_batch_size=6, prefill_step_size=64)
        for submission in ("late", "early")
    )
    assert joining(early, work) == joining(late, work)
    assert late.num_early == 0
    assert early.num_early > 10
    assert early.logprobs == late.logprobs


def test_what_the_prefix_cache_saved_between_early_steps_is_found(
    folders: dict[str, Path],
) -> None:
    [prompt] = random_prompts(3, [200], VOCAB_SIZE)
    answers = []
    for submission in ("late", "early"):
        engine = Engine(folders["qwen3"], submission, num_blocks=64)
        [first] = engine.run([prompt])
        again = [*prompt, *first, 5, 6]
        engine.run(random_prompts(4, [60, 150], VOCAB_SIZE))
        engine.add("again", again)
        engine.finish()
        report = engine.reports["again"]
        answers.append((first, engine.tokens["again"], report.num_cached_tokens))
    assert answers[0] == answers[1]
    assert answers[0][2] >= 192


def test_preempted_rows_go_on_with_the_same_tokens_early(folders: dict[str, Path]) -> None:
    prompts = random_prompts(6, [60] * 4, VOCAB_SIZE)
    sampling = replace(GREEDY, max_tokens=80)
    late, early = (
        Engine(folders["qwen3"], submission, max_kv_tokens=400) for submission in ("late", "early")
    )
    assert early.run(prompts, sampling) == late.run(prompts, sampling)
    assert early.num_early > 10


def test_a_plan_with_something_to_do_for_slabs_waits_for_the_last_step(
    folders: dict[str, Path],
) -> None:
    engine = Engine(folders["qwen3"], "early")
    runner = engine.core._runner
    assert isinstance(runner, ModelRunner)
    order, pending = runner._order, []

    def watched(plan: StepPlan) -> None:
        order(plan)
        pending.append((bool(plan.saves or plan.kv_ops or plan.loads), engine.num_early))

    runner._order = watched  # type: ignore[method-assign]
    joining(engine, jobs(2, [5, 300, 17, 40, 3, 90]))
    followed = zip(pending, [*pending[1:], (False, engine.num_early)], strict=True)
    assert [after - before for (has, before), (_, after) in followed if has].count(1) == 0
    assert any(has for has, _ in pending)


@observes("CpuConfig.submission")
def test_submission_is_told_and_its_memory_is_counted(folders: dict[str, Path]) -> None:
    measured = Measured(None, StepCosts(), ForwardBytes(4096), 1e9)
    late, early = (
        Engine(folders["qwen3"], submission, memory_limit_bytes=1 << 30, measured=measured)
        for submission in ("late", "early")
    )
    assert late.ready.submission == "late"
    assert early.ready.submission.startswith("early over slabs of up to")
    runner = early.core._runner
    assert isinstance(runner, ModelRunner)
    counted_bytes = late.ready.kv_limit_bytes - early.ready.kv_limit_bytes
    token_bytes = early.ready.kv_bytes_per_token
    assert counted_bytes >= runner.early.max_slab_bytes - token_bytes > 0


def test_steps_that_are_larger_than_what_was_counted_are_submitted_late(
    folders: dict[str, Path],
) -> None:
    engine = Engine(folders["qwen3"], "early")
    runner = engine.core._runner
    assert isinstance(runner, ModelRunner)
    work = random_prompts(3, [20, 30], VOCAB_SIZE)
    for early in (EarlySteps(1, 1000), EarlySteps(1 << 40, 1), NEVER):
        runner.early = early
        engine.run(work)
        assert engine.num_early == 0
    runner.early = ALWAYS
    engine.run(work)
    assert engine.num_early > 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_both_ways_are_measured_where_they_are_to_be_chosen_from(
    family: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        engine = Engine(folders[family], "auto", keeps_profile=False)
    runner = engine.core._runner
    assert isinstance(runner, ModelRunner)
    if not runner.policy.submits_slowly:
        assert "early steps save" in caplog.text
    assert runner._storage.slabs == {}
    assert engine.ready.submission == runner.early.describe()
    assert engine.run(random_prompts(5, [20, 70], VOCAB_SIZE)) == Engine(
        folders[family], "late"
    ).run(random_prompts(5, [20, 70], VOCAB_SIZE))


class FakeHandle:
    def collect(self) -> Iterator[StepResult]:
        yield {}


class FakeSteps:
    """Takes so many seconds for a late step, and for an early one and its copies, and so many more
    for each place that a row might have."""

    def __init__(
        self,
        storage: KVStorage,
        late_s: float,
        early_s: float,
        copy_s: float,
        per_place_s: float = 0.0,
    ) -> None:
        self.early = EarlySteps(17, 17)
        self._storage = storage
        self._late_s, self._early_s, self._copy_s = late_s, early_s, copy_s
        self._per_place_s = per_place_s
        self.capacities: list[int] = []
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.decodes:
            [slab] = {work.slab_id for work in plan.decodes}
            capacity = self._storage.slabs[slab].capacity
            self.capacities.append(capacity)
            early_s = self._early_s + (self._copy_s if capacity > SMALL_CAPACITY else 0.0)
            step_s = early_s if self.early is ALWAYS else self._late_s
            self.now_s += step_s + self._per_place_s * capacity
        return FakeHandle()


LAYERS = [LayerShape(2, 64, 64)]
LOOKS = 2  # steps over each slab before one is chosen


@pytest.mark.parametrize(
    ("late_s", "early_s", "copy_s", "chosen"),
    [(0.004, 0.002, 0.008, "some"), (0.004, 0.002, 0.0, "all"), (0.002, 0.004, 0.0, "none")],
)
def test_the_quicker_way_is_chosen_by_what_slabs_hold(
    late_s: float, early_s: float, copy_s: float, chosen: str
) -> None:
    storage = KVStorage(LAYERS, BACKEND)
    steps = FakeSteps(storage, late_s, early_s, copy_s)
    both_ways = BothWays(steps, storage, 4, 64 << 20, steps.clock)
    measured = both_ways.measured(lambda: True, 60.0)
    assert measured is not None
    assert steps.early == EarlySteps(17, 17), "as it was"
    assert storage.slabs == {}
    share = (measured.early_slab_bytes or 0) / measured.large.slab_bytes
    assert {"some": 0.1 < share < 0.5, "all": share == 1, "none": share == 0}[chosen]


def test_without_time_each_way_is_tried_once_and_without_room_never() -> None:
    storage = KVStorage(LAYERS, BACKEND)
    in_trials = []
    for has_time in (False, True):
        steps = FakeSteps(storage, 0.0, 0.0, 0.0)
        assert BothWays(steps, storage, 4, 64 << 20).measured(lambda has=has_time: has, 60.0)
        largest = max(steps.capacities)
        in_trials.append(steps.capacities.count(largest) - LOOKS)
    assert in_trials[1] == 3 * in_trials[0] > 0
    none = BothWays(FakeSteps(storage, 0.0, 0.0, 0.0), storage, 4, 4096).measured(bool, 60.0)
    assert none is None


def test_the_large_slab_is_no_larger_than_there_is_time_for() -> None:
    """A step may take 20 ms; over 1024 places it takes 10, over 4096 it would take 40."""
    storage = KVStorage(LAYERS, BACKEND)
    steps = FakeSteps(storage, 0.0, 0.0, 0.0, per_place_s=1e-5)
    both_ways = BothWays(steps, storage, 4, 64 << 20, steps.clock)
    measured = both_ways.measured(lambda: False, both_ways.least_s(0.02))
    assert measured is not None
    assert measured.large.slab_bytes == 4 * measured.small.slab_bytes
    assert max(steps.capacities) == 4 * SMALL_CAPACITY
    assert storage.slabs == {}


def test_a_device_that_is_slow_over_any_large_slab_is_given_late_steps() -> None:
    storage = KVStorage(LAYERS, BACKEND)
    steps = FakeSteps(storage, 0.0, 0.0, 0.0, per_place_s=4e-5)
    both_ways = BothWays(steps, storage, 4, 64 << 20, steps.clock)
    assert both_ways.measured(lambda: True, both_ways.least_s(0.02)) is None
    assert len(steps.capacities) == 2 * LOOKS, "the small one and one that is larger"
    assert storage.slabs == {}
    assert steps.early == EarlySteps(17, 17), "as it was"
