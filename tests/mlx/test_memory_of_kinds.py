"""The account of bytes is what the arrays hold, for each kind of layer state."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from mlx_lm_server.core.plan import CreateSlab, DropSlab
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.model_runner import ModelRunner
from mlx_lm_server.runner.state.kv_storage import KVStorage
from tests.back_ends import BACKEND

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, WIDE_HEADS, write_model

pytestmark = pytest.mark.each_way

FAMILIES = ("gemma3_text", "deepseek_v3", "qwen3_next", "baichuan_m1", "mamba2")


def runner_of(engine: EngineDriver) -> ModelRunner:
    runner = engine.core._runner
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ledger_counts_what_slabs_and_states_hold(family: str, tmp_path: Path) -> None:
    engine = EngineDriver(write_model(family, tmp_path / family), max_batch_size=4)
    runner = runner_of(engine)
    for i, prompt in enumerate(random_prompts(5, (5, 70, 140), VOCAB_SIZE)):
        engine.add(f"row-{i}", prompt, replace(GREEDY, max_tokens=60))
    for _ in range(30):
        engine.step()
    held = runner.kv_held_bytes + runner.state_held_bytes
    assert engine.core.stats().kv_used_bytes == held
    assert runner.state_held_bytes == 3 * runner.geometry.bytes_per_row
    engine.finish()
    engine.step()
    assert runner.kv_held_bytes == runner.state_held_bytes == engine.core.stats().kv_used_bytes == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", sorted(WIDE_HEADS))
def test_the_ledger_counts_what_quantised_slabs_hold(
    family: str, bits: int, tmp_path: Path
) -> None:
    folder = write_model(family, tmp_path / family, has_wide_heads=True)
    engine = EngineDriver(folder, max_batch_size=4, kv_bits=bits, kv_group_size=32)
    runner = runner_of(engine)
    for i, prompt in enumerate(random_prompts(5, (5, 70, 140), VOCAB_SIZE)):
        engine.add(f"row-{i}", prompt, replace(GREEDY, max_tokens=60))
    for _ in range(20):
        engine.step()
    held = runner.kv_held_bytes + runner.state_held_bytes
    assert engine.core.stats().kv_used_bytes == held
    plain = EngineDriver(folder, max_batch_size=4).ready.kv_bytes_per_token
    # Of 32 float32 numbers: their bits, and a scale and a bias in float32.
    assert engine.ready.kv_bytes_per_token == plain * (bits * 32 + 64) // (32 * 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_takes_what_the_geometry_says_at_any_capacity(family: str, tmp_path: Path) -> None:
    order = LoadModel(str(write_model(family, tmp_path / family)))
    loaded = loader.load(order, BACKEND, lambda _s, _f: None)
    assert loaded.state is not None
    storage = KVStorage(loaded.state.kv, BACKEND)
    for capacity in (1, 24, 31, 32, 33, 500):
        storage.apply(CreateSlab(0, 3, capacity))
        assert storage.nbytes == 3 * storage.geometry.slot_bytes(capacity)
        storage.apply(DropSlab(0))


def test_a_window_bounds_the_memory_of_a_long_row(tmp_path: Path) -> None:
    runner = runner_of(EngineDriver(write_model("gemma3_text", tmp_path / "gemma3")))
    geometry = runner.geometry
    growth = geometry.slot_bytes(2000) - geometry.slot_bytes(1000)
    assert growth == 1000 * geometry.bytes_per_token // 2  # half of its layers have a window


def test_steps_write_rings_and_slabs_in_place(tmp_path: Path) -> None:
    engine = EngineDriver(write_model("gemma3_text", tmp_path / "gemma3"), max_batch_size=4)
    for i, prompt in enumerate(random_prompts(3, (1500,) * 4, VOCAB_SIZE)):
        engine.add(f"long-{i}", prompt, replace(GREEDY, max_tokens=200))
    while not all(engine.tokens.values()):
        engine.step()
    held = runner_of(engine).kv_held_bytes
    assert engine.usual_peak_bytes() < held / 3
    assert runner_of(engine).kv_held_bytes == held
