"""A device's way is chosen once, and can be forced."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import mlx.core as mx
import pytest

from mlx_lm_server.config import Way
from mlx_lm_server.runner.backends import choose as choose_module
from mlx_lm_server.runner.backends.choose import choose, policy_of
from mlx_lm_server.runner.backends.fused_kernel import FusedKernel
from mlx_lm_server.runner.loading.measuring import Measurer
from mlx_lm_server.runner.model_runner import ModelRunner
from tests.back_ends import only_x86

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

WAYS = get_args(Way)
CONTEXT = 4096  # of a tiny model


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_goes_the_way_that_it_is_told(way: Way, tmp_path: Path) -> None:
    engine = EngineDriver(write_model("qwen3", tmp_path), way=way)
    assert engine.ready.way == way
    [tokens] = engine.run(random_prompts(1, [20], VOCAB_SIZE))
    assert len(tokens) == GREEDY.max_tokens
    is_forced = way != choose().policy.way
    assert ("forced" in engine.ready.device) == is_forced


def test_a_forced_way_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    other = next(way for way in WAYS if way != choose().policy.way)
    with caplog.at_level(logging.WARNING):
        choose(other)
        choose()
    [record] = caplog.records
    assert other in record.getMessage()


def test_a_way_of_cpus_computes_on_the_cpu_whatever_else_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[mx.DeviceType] = []
    monkeypatch.setattr(choose_module, "_own_way", lambda: "metal")
    monkeypatch.setattr(mx, "set_default_device", devices.append)
    for way in WAYS:
        choose(way)
    assert devices == [mx.cpu, mx.cpu], "x86 and plain"


@pytest.mark.parametrize("way", ["metal", "cuda", "plain"])
def test_other_ways_use_nothing_of_ours(way: Way) -> None:
    backend = choose(way)
    assert backend.draw is None
    assert backend.copy_heads is None
    assert isinstance(backend.kernel(mx.float32), FusedKernel)


def test_gpus_keep_slabs_out_of_the_hosts_hands() -> None:
    for way in ("metal", "cuda"):
        policy = policy_of(way, "GPU")
        assert not policy.is_in_host_memory
        assert not policy.submits_slowly
        assert not policy.widens_weights
        assert policy.max_resized_bytes is None


def _bytes_beside_kv(engine: EngineDriver) -> int:
    return engine.ready.memory_limit_bytes - engine.ready.kv_limit_bytes


@pytest.mark.parametrize("way", WAYS)
def test_k_and_v_stay_in_16_bits_where_a_row_of_the_whole_context_fits(
    way: Way, tmp_path: Path
) -> None:
    """Where it does not, a GPU keeps them in 8; what a forward takes of the memory counts too."""
    folder = write_model("qwen3", tmp_path, has_wide_heads=True)
    order = {"way": way, "cpu_weights": "native", "max_num_batched_tokens": 512}
    ample = EngineDriver(folder, memory_limit_bytes=1 << 30, **order)
    row_bytes = CONTEXT * ample.ready.kv_bytes_per_token
    rest = _bytes_beside_kv(ample)
    assert (ample.ready.kv_bits, ample.ready.context_tokens) == (16, CONTEXT)
    fitting = EngineDriver(folder, memory_limit_bytes=rest + row_bytes * 5 // 4, **order)
    assert fitting.ready.kv_bits == 16
    assert fitting.ready.kv_limit_tokens >= CONTEXT
    limit_bytes = fitting.ready.memory_limit_bytes
    in_16 = fitting
    while in_16.ready.kv_limit_tokens > CONTEXT * 3 // 4:
        limit_bytes -= row_bytes // 4
        in_16 = EngineDriver(folder, memory_limit_bytes=limit_bytes, kv_bits=16, **order)
    tight = EngineDriver(folder, memory_limit_bytes=limit_bytes, **order)
    assert tight.ready.kv_bits == (8 if way in ("metal", "cuda") else 16)
    [tokens] = tight.run(random_prompts(1, [20], VOCAB_SIZE))
    assert len(tokens) == GREEDY.max_tokens


def test_a_row_that_fits_in_no_case_is_seen_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[str] = []
    measurer = ModelRunner.measurer

    def watched(runner: ModelRunner, limit_s: float, *, tries_early: bool = False) -> Measurer:
        formats.append(runner.kv_format)
        return measurer(runner, limit_s, tries_early=tries_early)

    monkeypatch.setattr(ModelRunner, "measurer", watched)
    folder = write_model("qwen3", tmp_path, has_wide_heads=True)
    order = {"way": "metal", "max_num_batched_tokens": 64, "keeps_profile": False}
    row_bytes = CONTEXT * EngineDriver(folder, **order).ready.kv_bytes_per_token
    EngineDriver(folder, memory_limit_bytes=row_bytes, **order)
    assert formats == ["float32", "8-bit, groups of 64"]


def test_bits_that_were_chosen_for_want_of_memory_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model("qwen3", tmp_path, has_wide_heads=True)
    order = {"way": "cuda", "memory_limit_bytes": 6_000_000, "max_num_batched_tokens": 64}
    caplog.clear()
    EngineDriver(folder, **order)
    [line] = [r.getMessage() for r in caplog.records if "bits" in r.getMessage()]
    assert line.startswith("K and V are kept in 8 bits")
    assert "4096 tokens x 2 KiB = 8 MiB of KV" in line
    assert "--kv-bits 16" in line


@pytest.mark.parametrize(
    "asked", [{"kv_bits": 16}, {"max_kv_tokens": 1000}], ids=["16 bits", "a short row"]
)
def test_what_was_asked_keeps_k_and_v_in_16_bits(asked: dict[str, int], tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path, has_wide_heads=True)
    order = {"way": "metal", "memory_limit_bytes": 6_000_000, "max_num_batched_tokens": 64}
    assert EngineDriver(folder, **order).ready.kv_bits == 8
    assert EngineDriver(folder, **order, **asked).ready.kv_bits == 16


def test_heads_that_no_group_divides_stay_as_they_are_in_tight_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model("qwen3", tmp_path)  # heads of 16
    engine = EngineDriver(
        folder, way="metal", memory_limit_bytes=3_500_000, max_num_batched_tokens=64
    )
    assert engine.ready.kv_bits == 16
    assert engine.ready.kv_limit_tokens < CONTEXT
    assert "K and V are kept" not in caplog.text


@only_x86
def test_all_ways_give_the_same_tokens_in_float32(tmp_path: Path) -> None:
    folder, prompts = write_model("qwen3", tmp_path), random_prompts(2, [5, 40, 17], VOCAB_SIZE)
    answers = [EngineDriver(folder, way=way, kv_bits=16).run(prompts) for way in WAYS]
    assert all(answer == answers[0] for answer in answers)
