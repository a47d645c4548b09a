"""What an engine takes of a GPU's memory, what MLX is told of it, and what is given back."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lm_server import platform
from mlx_lm_server.protocol import MemoryPressure
from mlx_lm_server.runner import device_memory
from mlx_lm_server.runner.backend import MemoryPlan
from mlx_lm_server.runner.backends import gpu_memory
from mlx_lm_server.runner.backends.choose import policy_of
from mlx_lm_server.runner.backends.fused import FusedBackend
from mlx_lm_server.runner.backends.gpu_memory import (
    CALM_S,
    IDLE_BEFORE_CLEAR_S,
    KEPT_AT_WARNING,
    LEAST_AT_WARNING,
    SECONDS_BETWEEN_CUTS,
    GpuUpkeep,
)
from mlx_lm_server.runner.device_memory import DeviceInfo, HostMemory, MlxMemory, read_pressure
from tests.device_memories import (
    GB10,
    GB10_CARVED_OUT,
    GIB,
    H100,
    M1_8,
    M3_16,
    M4_PRO_48,
    M5_MAX_64_RAISED,
    M5_MAX_128,
    MIB,
    ORIN,
    ORIN_NANO,
    RTX_4090,
    RTX_4090_SHARED,
    FakeMemory,
)

from .driver import EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

SMALL_HOST = HostMemory(16 * GIB, 9 * GIB)
SPARK = HostMemory(127600748 * 1024, 118566368 * 1024)
BOARD = HostMemory(30 * GIB, 20 * GIB)


@pytest.mark.parametrize(
    ("info", "host", "gib"),
    [
        (M1_8, SMALL_HOST, 4.0),  # 4 GiB are left to others
        (M3_16, SMALL_HOST, 10.66),  # nine tenths of the working set
        (M4_PRO_48, SMALL_HOST, 33.70),
        (M5_MAX_64_RAISED, SMALL_HOST, 50.40),
        (M5_MAX_128, SMALL_HOST, 96.77),
        (RTX_4090, SMALL_HOST, 21.59),  # nine tenths of the card, whatever the host has
        (RTX_4090_SHARED, SMALL_HOST, 9.5),  # others have the rest of it
        (RTX_4090 | {"free_memory": 0}, SMALL_HOST, 0.0),  # a full card is no card
        (H100, SMALL_HOST, 71.68),
        (GB10, SPARK, 107.42),  # what the page cache has is free
        (GB10_CARVED_OUT, SPARK, 107.42),
        (ORIN, BOARD, 19.0),
        (ORIN_NANO, HostMemory(8 * GIB, 7 * GIB), 4.0),  # 4 GiB are left to others here too
    ],
    ids=lambda row: row.get("device_name") if isinstance(row, dict) else None,
)
def test_what_is_planned_with_is_the_devices(
    info: DeviceInfo, host: HostMemory, gib: float
) -> None:
    assert gpu_memory.limit_bytes(info, host) / GIB == pytest.approx(gib, abs=0.01)


def test_a_working_set_that_was_raised_leaves_others_their_share() -> None:
    raised = {**M5_MAX_64_RAISED, "max_recommended_working_set_size": 64 * GIB}
    assert gpu_memory.limit_bytes(raised, SMALL_HOST) == int(0.9 * 64 * GIB)
    small = {**M3_16, "max_recommended_working_set_size": 15 * GIB}
    assert gpu_memory.limit_bytes(small, SMALL_HOST) == 12 * GIB


def test_a_device_of_which_nothing_is_told_is_planned_with_the_hosts_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert gpu_memory.limit_bytes({"device_name": "GPU"}, SMALL_HOST) == int(0.75 * 9 * GIB)
    assert "does not tell" in caplog.text


@pytest.mark.parametrize(("way", "info"), [("metal", M3_16), ("cuda", RTX_4090_SHARED)])
def test_the_back_end_of_a_gpu_plans_with_it(way: str, info: DeviceInfo) -> None:
    policy = policy_of(way, "GPU")  # type: ignore[arg-type]
    memory = FakeMemory(info, SMALL_HOST)
    expected = gpu_memory.limit_bytes(info, SMALL_HOST)
    assert FusedBackend(policy, memory=memory).memory_limit_bytes() == expected
    forced = FusedBackend(policy, has_device=False, memory=memory)
    assert forced.memory_limit_bytes() == int(0.75 * 9 * GIB)


# ---- what MLX is told


PLAN = MemoryPlan(limit_bytes=20 * GIB, held_bytes=17 * GIB, step_bytes=2 * GIB)


def test_mlx_keeps_no_more_than_was_promised_and_what_a_step_finds_again() -> None:
    memory = FakeMemory()
    gpu_memory.keep_to(PLAN, memory)
    assert (memory.memory_limit_bytes, memory.cache_limit_bytes) == (20 * GIB, 2 * GIB)
    small = MemoryPlan(limit_bytes=GIB, held_bytes=GIB // 2, step_bytes=MIB)
    gpu_memory.keep_to(small, memory)
    assert (memory.memory_limit_bytes, memory.cache_limit_bytes) == (GIB, GIB // 4)
    tiny = MemoryPlan(limit_bytes=100 * MIB, held_bytes=50 * MIB, step_bytes=MIB)
    gpu_memory.keep_to(tiny, memory)
    assert memory.cache_limit_bytes == 100 * MIB


@pytest.mark.parametrize(
    ("info", "held_gib", "wired_gib"),
    [
        (M4_PRO_48, 17, 19.0),  # with what a step takes
        (M4_PRO_48, 45, 37.44),  # the working set
        (M3_16, 15, 11.84),
        (M1_8, 15, 4.0),  # what others need is not
        (RTX_4090, 17, 0.0),
    ],
)
def test_what_is_wired_is_held_and_nobody_elses(
    info: DeviceInfo, held_gib: int, wired_gib: float
) -> None:
    memory = FakeMemory(info)
    gpu_memory.keep_to(MemoryPlan(48 * GIB, held_gib * GIB, 2 * GIB), memory)
    assert memory.wired_limit_bytes / GIB == pytest.approx(wired_gib, abs=0.01)


def test_a_system_that_wires_nothing_is_told_of_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu_memory.keep_to(PLAN, FakeMemory(refusal="only macOS 15 and later can"))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "19 GiB cannot be kept resident (only macOS 15" in record.getMessage()


@pytest.mark.parametrize("version", [(), (14, 7)])
def test_nothing_is_wired_before_macos_15(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "macos_version", lambda: version)
    assert "macOS 15" in (MlxMemory().wire(GIB) or "")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_mlx_refuses_to_wire_is_a_reason(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def refuse(num_bytes: int) -> int:
        told.append(num_bytes)
        raise kind("larger than the maximum working set size")

    monkeypatch.setattr(platform, "macos_version", lambda: (15, 3))
    assert MlxMemory().wire(0) is None
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    assert MlxMemory().wire(GIB) == "larger than the maximum working set size"
    assert told == [GIB]


def test_mlx_takes_its_limits_and_gives_its_cache_back() -> None:
    memory = MlxMemory()
    old = mx.set_memory_limit(1 << 40), mx.set_cache_limit(64 * MIB)
    try:
        memory.set_limits(memory_bytes=3 << 40, cache_bytes=32 * MIB)
        assert (mx.set_memory_limit(1 << 40), mx.set_cache_limit(64 * MIB)) == (3 << 40, 32 * MIB)
        before, array = memory.active_bytes, mx.zeros((MIB,), mx.uint8)
        mx.eval(array)
        assert memory.active_bytes >= before + MIB
        del array
        assert memory.cached_bytes >= MIB
        memory.clear_cache()
        assert memory.cached_bytes == 0
    finally:
        mx.set_memory_limit(old[0])
        mx.set_cache_limit(old[1])


def test_an_engine_tells_the_device_what_it_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the device is there: a way that is forced on another one leaves its limits."""
    plans: list[MemoryPlan] = []
    monkeypatch.setattr(gpu_memory, "keep_to", lambda plan, _memory: plans.append(plan))
    folder = write_model("qwen3", tmp_path)
    EngineDriver(folder, way="metal", keeps_profile=False)
    assert plans == []
    monkeypatch.setattr(FusedBackend, "_has_gpu", True)
    monkeypatch.setattr(FusedBackend, "memory_limit_bytes", lambda _: 1 << 30)
    ready = EngineDriver(folder, way="metal", keeps_profile=False).ready
    [plan] = plans
    assert plan.limit_bytes == ready.memory_limit_bytes
    assert plan.held_bytes == ready.weights_bytes + ready.kv_limit_bytes
    assert 0 < plan.step_bytes <= plan.limit_bytes - plan.held_bytes


# ---- between steps


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def upkeep_of(level: MemoryPressure = "normal") -> tuple[GpuUpkeep, FakeMemory, Clock]:
    memory, clock = FakeMemory(level=level), Clock()
    return GpuUpkeep(memory, clock), memory, clock


def test_after_a_while_without_work_mlx_gives_its_cache_back_once() -> None:
    upkeep, memory, clock = upkeep_of()
    for now_s in (1001.0, 1002.0, 1002.5 + IDLE_BEFORE_CLEAR_S, 1200.0, 2000.0):
        clock.now_s = now_s
        upkeep.rest()
        assert memory.num_cleared == (now_s > 1002.0)
    upkeep.after_step(took_memory=False)
    for clock.now_s in (2001.0, 2002.0 + IDLE_BEFORE_CLEAR_S):
        upkeep.rest()
    assert memory.num_cleared == 2


def test_steps_keep_mlx_from_giving_its_cache_back() -> None:
    upkeep, memory, clock = upkeep_of()
    for _ in range(10):
        clock.now_s += 0.9 * IDLE_BEFORE_CLEAR_S
        upkeep.rest()
        upkeep.after_step(took_memory=True)
    assert memory.num_cleared == 0


def test_the_system_is_asked_once_a_second_at_most() -> None:
    upkeep, memory, clock = upkeep_of()
    for _ in range(500):
        clock.now_s += 0.01
        upkeep.after_step(took_memory=False)
    assert 4 <= memory.num_asked <= 6


def test_a_warning_costs_the_cache_a_share_and_more_as_long_as_it_lasts() -> None:
    upkeep, memory, clock = upkeep_of("warn")
    assert (upkeep.pressure, upkeep.cache_share) == ("normal", 1.0)
    upkeep.after_step(took_memory=False)
    assert (upkeep.pressure, upkeep.cache_share) == ("warn", KEPT_AT_WARNING)
    assert memory.num_cleared == 0
    clock.now_s += 1.5
    upkeep.after_step(took_memory=False)
    assert upkeep.cache_share == KEPT_AT_WARNING
    assert memory.num_cleared == 1, "what the cache has dropped"
    clock.now_s += SECONDS_BETWEEN_CUTS
    upkeep.rest()
    assert upkeep.cache_share == KEPT_AT_WARNING**2
    for _ in range(20):
        clock.now_s += SECONDS_BETWEEN_CUTS
        upkeep.rest()
    assert upkeep.cache_share == LEAST_AT_WARNING


def test_a_critical_state_costs_all_of_it_and_mlxs_cache() -> None:
    upkeep, memory, clock = upkeep_of("critical")
    upkeep.after_step(took_memory=False)
    assert (upkeep.pressure, upkeep.cache_share) == ("critical", 0.0)
    assert memory.num_cleared == 1
    clock.now_s += 1.5
    memory.level = "warn"
    upkeep.after_step(took_memory=False)
    assert memory.num_cleared == 2, "what the prefix cache dropped meanwhile"
    clock.now_s += 2 * SECONDS_BETWEEN_CUTS
    upkeep.after_step(took_memory=False)
    assert upkeep.cache_share == 0.0, "a warning gives nothing back"


def test_the_cache_may_grow_when_memory_was_not_short_for_a_while() -> None:
    upkeep, memory, clock = upkeep_of("warn")
    upkeep.rest()
    memory.level = "normal"
    clock.now_s += CALM_S - 1
    upkeep.rest()
    assert (upkeep.pressure, upkeep.cache_share) == ("normal", KEPT_AT_WARNING)
    clock.now_s += 2
    upkeep.rest()
    assert upkeep.cache_share == 1.0


def test_what_the_engine_s_cache_has_goes_when_memory_is_short_and_the_engine_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the system's level to the bytes that are held, with nobody asking for anything."""
    level: list[MemoryPressure] = ["normal"]
    monkeypatch.setattr(MlxMemory, "pressure", lambda _: level[0])
    monkeypatch.setattr(gpu_memory, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(gpu_memory, "CALM_S", 0.0)
    engine = EngineDriver(write_model("qwen3", tmp_path), way="metal")
    prompts = random_prompts(3, [200, 300], VOCAB_SIZE)
    answers = engine.run(prompts)
    stats = engine.core.stats()
    assert stats.kv_cached_bytes > 0
    assert stats.memory_pressure == "normal"
    level[0] = "critical"
    engine.core.rest()
    assert engine.core.has_work
    engine.finish()
    stats = engine.core.stats()
    assert (stats.kv_cached_bytes, stats.num_cached_blocks) == (0, 0)
    assert engine.core._runner.cache_held_bytes == 0  # type: ignore[attr-defined]
    assert stats.memory_pressure == "critical"
    assert engine.run(prompts) == answers
    assert engine.core.stats().kv_cached_bytes == 0, "it does not grow again at once"
    level[0] = "normal"
    engine.core.rest()
    assert engine.run(prompts) == answers
    assert engine.core.stats().kv_cached_bytes > 0


# ---- macOS' level


@pytest.mark.parametrize(
    ("number", "status", "level"),
    [
        (1, 0, "normal"),
        (2, 0, "warn"),
        (4, 0, "critical"),
        (3, 0, "normal"),
        (0, 0, "normal"),
        (4, -1, "normal"),
    ],
)
def test_the_kernels_levels_are_read(number: int, status: int, level: str) -> None:
    """By a function that is called as C calls it."""
    asked: list[bytes] = []
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    )

    def sysctlbyname(
        name: bytes, out: ctypes.Array, size: ctypes.Array, new: int | None, new_size: int
    ) -> int:
        asked.append(name)
        assert (size[0], new, new_size) == (4, None, 0)
        out[0] = number
        return status

    assert read_pressure(kind(sysctlbyname)) == level
    assert asked == [b"kern.memorystatus_vm_pressure_level"]


def test_only_macos_is_asked_how_short_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "read_pressure", lambda _: "critical")
    monkeypatch.setattr(platform, "is_macos", lambda: False)
    assert MlxMemory().pressure() == "normal"
