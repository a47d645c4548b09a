"""What the server orders of an engine (`LoadModel`) has its effect there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.config import (
    BatchingConfig,
    Config,
    CpuConfig,
    KVConfig,
    ModelConfig,
    TierConfig,
)
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.plan import StepPlan
from mlx_lm_server.engine import assembly
from mlx_lm_server.engine.profiles import OthersWork, load_profile
from mlx_lm_server.errors import ModelTooLargeError, UnsupportedModelError
from mlx_lm_server.protocol import Abort, AddRequest, LoadModel
from mlx_lm_server.runner.loading.measuring import Measurer, fastest_threads
from mlx_lm_server.server.boot import load_message
from tests.mlx.driver import GREEDY, EngineDriver, random_prompts
from tests.mlx.tiny_models import VOCAB_SIZE, write_model
from tests.observations import observes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3", tmp_path_factory.mktemp("tiny"))


def engine(folder: Path, **sections: object) -> EngineDriver:
    """With the settings of a Config, by the way that they take."""
    sections = {"tier": TierConfig(no_ssd=True), **sections}
    order = load_message(Config(**sections), folder)  # type: ignore[arg-type]
    fields = {f: getattr(order, f) for f in LoadModel.__struct_fields__ if f != "model_path"}
    return EngineDriver(folder, **fields)


def plans_of(driver: EngineDriver, lengths: list[int]) -> list[StepPlan]:
    """What the scheduler plans for prompts of these lengths."""
    found: list[StepPlan] = []
    scheduler = driver.core._scheduler
    plan = scheduler.schedule

    def watched(now_s: float) -> StepPlan | None:
        found.extend([one] if (one := plan(now_s)) is not None else [])
        return one

    scheduler.schedule = watched  # type: ignore[method-assign]
    driver.run(random_prompts(1, lengths, VOCAB_SIZE), GREEDY)
    return found


def most(plans: list[StepPlan], count: Callable[[StepPlan], int]) -> int:
    return max(map(count, plans))


@observes(
    "BatchingConfig.max_batch_size",
    "BatchingConfig.max_num_batched_tokens",
    "BatchingConfig.prefill_batch_size",
    "BatchingConfig.prefill_step_size",
)
def test_a_step_is_as_large_as_it_may_be(folder: Path) -> None:
    lengths = [40] * 12
    plans = plans_of(engine(folder, batching=BatchingConfig(max_batch_size=5)), lengths)
    assert most(plans, lambda plan: len(plan.sampling)) == 5
    batching = BatchingConfig(max_num_batched_tokens=64)
    plans = plans_of(engine(folder, batching=batching), lengths)
    assert most(plans, lambda plan: plan.num_chunk_tokens + len(plan.decodes)) == 64
    plans = plans_of(engine(folder, batching=BatchingConfig(prefill_batch_size=2)), lengths)
    assert most(plans, lambda plan: len(plan.chunks)) == 2
    plans = plans_of(engine(folder, batching=BatchingConfig(prefill_step_size=16)), lengths)
    assert most(plans, lambda plan: max((c.num_tokens for c in plan.chunks), default=0)) == 16


@observes("BatchingConfig.itl_goal_ms")
def test_the_goal_is_what_the_scheduler_plans_for(folder: Path) -> None:
    driver = engine(folder, batching=BatchingConfig(itl_goal_ms=70))
    assert driver.core._scheduler._limits.step_goal_s(0.001, is_short=False) == 0.07


@observes("KVConfig.max_kv_size", "KVConfig.memory_limit_gb")
def test_memory_is_bounded(folder: Path) -> None:
    free = engine(folder).ready
    assert engine(folder, kv=KVConfig(max_kv_size=2000)).ready.kv_limit_tokens == 2000
    bounded = engine(folder, kv=KVConfig(memory_limit_gb=0.1)).ready
    assert bounded.memory_limit_bytes == 100_000_000
    assert bounded.kv_limit_bytes < min(free.kv_limit_bytes, 100_000_000)
    with pytest.raises(ModelTooLargeError):
        engine(folder, kv=KVConfig(memory_limit_gb=0.0001))


@observes("KVConfig.kv_bits", "KVConfig.kv_group_size")
def test_k_and_v_are_kept_in_as_few_bits_as_asked(tmp_path: Path) -> None:
    """8-bit codes, and per group a scale and an offset."""
    folder = write_model("mistral", tmp_path)  # heads of 32
    whole = engine(folder, kv=KVConfig(kv_bits=16)).ready
    coded = engine(folder, kv=KVConfig(kv_bits=8, kv_group_size=32)).ready
    assert (whole.kv_bits, coded.kv_bits) == (16, 8)
    assert coded.kv_bytes_per_token < whole.kv_bytes_per_token / 2
    with pytest.raises(UnsupportedModelError, match="64"):
        engine(folder, kv=KVConfig(kv_bits=8, kv_group_size=64))


@observes("CpuConfig.cpu_weights")
def test_weights_are_held_as_asked(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path, bits=4)
    assert engine(folder, cpu=CpuConfig(cpu_weights="float32")).ready.weights == "float32"
    assert "4" in engine(folder, cpu=CpuConfig(cpu_weights="native")).ready.weights


@observes("CpuConfig.no_profile")
def test_what_was_measured_is_kept_for_the_next_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measurements: list[Measured] = []
    measured = Measurer.measured

    def watched(measurer: Measurer, *args: Any) -> Measured:
        found = replace(measured(measurer, *args), is_steady=is_steady)
        measurements.append(found)
        return found

    monkeypatch.setattr(Measurer, "measured", watched)

    def num_measured(*, is_quiet: bool = True, **cpu: bool) -> int:
        monkeypatch.setattr(OthersWork, "is_little", is_quiet)
        before = len(measurements)
        engine(folder, cpu=CpuConfig(**cpu))
        return len(measurements) - before

    is_steady = True
    assert num_measured(no_profile=True) == 1
    assert num_measured(is_quiet=False) == 1  # --no-profile kept nothing
    is_steady = False
    assert num_measured() == 1  # nothing was kept, since others were at work
    is_steady = True
    assert num_measured() == 1  # nor then, since it was not steady
    assert num_measured() == 0
    assert num_measured(no_profile=True) == 1
    file = next((tmp_path / "mlx-lm-server" / "profiles").iterdir())
    assert load_profile(file) == measurements[3]


def test_measuring_ends_when_its_time_is_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any time it runs what it cannot do without, once each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    num_runs = {0.0: 0, 1e9: 0}
    run = Measurer._run
    for limit_s in num_runs:
        monkeypatch.setattr(assembly, "MIN_MEASURING_S", limit_s)
        monkeypatch.setattr(assembly, "MEASURING_SHARE", 0.0)

        def counted(measurer: Measurer, plan: StepPlan, limit_s: float = limit_s) -> float:
            num_runs[limit_s] += 1
            return run(measurer, plan)

        monkeypatch.setattr(Measurer, "_run", counted)
        engine(folder, cpu=CpuConfig(no_profile=True))
    assert num_runs[0.0] <= 10
    assert num_runs[1e9] > num_runs[0.0]


@observes("CpuConfig.cpu_threads")
def test_the_blas_has_as_many_threads_as_asked() -> None:
    """A process of its own, since the number goes to the BLAS before mlx is there, as in
    engine_main."""
    order = load_message(Config(cpu=CpuConfig(cpu_threads=3)), Path("x"))
    program = (
        "import ctypes; from mlx_lm_server.runner.backends import blas; "
        f"loaded = blas.preload({order.num_threads}); "
        "print(ctypes.CDLL(str(loaded.path)).openblas_get_num_threads() if loaded.path else 3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["3"], done.stderr


@observes("ModelConfig.trust_remote_code")
def test_a_models_own_code_runs_only_if_trusted(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (own / "own.py").write_text("from mlx_lm.models.qwen3 import *\n")
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        engine(own)
    trusting = engine(own, model=ModelConfig(trust_remote_code=True))
    prompts = random_prompts(1, [20], VOCAB_SIZE)
    assert trusting.run(prompts) == engine(folder).run(prompts)


def test_progress_is_told_to_those_who_ask(folder: Path) -> None:
    driver = engine(folder, batching=BatchingConfig(prefill_step_size=16))
    prompts = random_prompts(5, [40, 40, 7], VOCAB_SIZE)
    told: dict[str, list[int]] = {name: [] for name in "abc"}
    for name, prompt in zip(told, prompts, strict=True):
        request = AddRequest(name, prompt, GREEDY, wants_progress=name != "b")
        assert driver.core.handle([request]) == []
    driver.core.handle([Abort("c")])
    while driver.core.has_work:
        for output in driver.core.step():
            if output.num_computed_tokens:
                assert output.token_ids == []
                told[output.req_id].append(output.num_computed_tokens)
    assert set(told.pop("b")) <= {16, 32}, "the server hears of it now and then, not of its end"
    assert told == {"a": [16, 32, 40], "c": []}


def test_no_progress_is_told_after_the_end(folder: Path) -> None:
    driver = engine(folder, batching=BatchingConfig(prefill_step_size=16))
    [prompt] = random_prompts(7, [80], VOCAB_SIZE)
    driver.core.handle([AddRequest("a", prompt, GREEDY, wants_progress=True)])
    while not any(output.num_computed_tokens for output in driver.core.step()):
        pass
    assert [output.finish_reason for output in driver.core.handle([Abort("a")])] == ["abort"]
    while driver.core.has_work:
        assert driver.core.step() == []


def test_progress_tells_what_was_cached(folder: Path) -> None:
    driver = engine(folder, batching=BatchingConfig(prefill_step_size=16))
    [prompt] = random_prompts(6, [80], VOCAB_SIZE)
    driver.run([prompt])
    driver.core.handle([AddRequest("again", [*prompt, 1], GREEDY, wants_progress=True)])
    told = []
    while driver.core.has_work:
        told += [
            (output.num_computed_tokens, output.num_reused_tokens)
            for output in driver.core.step()
            if output.num_computed_tokens
        ]
    assert told[-1][0] == 81
    assert all(reused >= 64 for _, reused in told)


@pytest.mark.parametrize(
    ("most", "taken_s", "chosen"),
    [
        (1, [], 1),
        (2, [1.0, 1.5], 2),
        (2, [1.0, 1.0], 2),
        (2, [1.9, 1.5, 1.0, 1.5], 2),
        (2, [1.9, 1.5, 1.6, 1.5, 1.0, 1.5], 2),
        (2, [1.9, 1.5] * 3, 1),
        (8, [1.9, 1.5, 1.7, 1.0, 1.5, 2.5], 8),
        (8, [1.9, 1.5, 1.7] * 3, 7),
    ],
)
def test_a_moment_of_other_work_takes_no_thread_away(
    most: int, taken_s: list[float], chosen: int
) -> None:
    assert fastest_threads(most, lambda _: taken_s.pop(0)) == chosen
    assert not taken_s


def test_threads_are_tried_once_where_there_is_no_time_for_more() -> None:
    taken_s = [1.9, 1.5]
    assert fastest_threads(2, lambda _: taken_s.pop(0), lambda: False) == 1


@observes("CpuConfig.way")
def test_the_device_is_treated_as_it_is_said(folder: Path) -> None:
    assert engine(folder, cpu=CpuConfig(way="plain")).ready.way == "plain"
    assert engine(folder, cpu=CpuConfig(way="cuda")).ready.device == "cuda (forced)"
