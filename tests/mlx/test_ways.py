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
from tests.back_ends import only_x86

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

WAYS = get_args(Way)


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
    assert policy_of("metal", "GPU").kv_bits == 8


@only_x86
def test_all_ways_give_the_same_tokens_in_float32(tmp_path: Path) -> None:
    folder, prompts = write_model("qwen3", tmp_path), random_prompts(2, [5, 40, 17], VOCAB_SIZE)
    answers = [EngineDriver(folder, way=way, kv_bits=16).run(prompts) for way in WAYS]
    assert all(answer == answers[0] for answer in answers)
