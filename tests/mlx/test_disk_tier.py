"""What comes back from the disk gives the tokens that computing gives, for every kind of state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from mlx_lm_server.config import Config, TierConfig
from mlx_lm_server.core import offloads, restores
from mlx_lm_server.engine.disk_cache import DiskCache
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.protocol import DiskTier
from mlx_lm_server.runner.backends import choose
from mlx_lm_server.runner.state import block_store
from mlx_lm_server.runner.state.plane_spans import PlaneCopies
from mlx_lm_server.runner.state.record_bytes import Span, copy_spans, read_array, stacked_bytes
from mlx_lm_server.server.boot import load_message
from mlx_lm_server.tier.files import OsFiles
from tests.back_ends import BACKEND, with_policy
from tests.observations import observes

from .driver import GREEDY, EngineDriver, random_prompts
from .test_prefix_cache import Cold
from .tiny_models import VOCAB_SIZE, write_model

# Full KV, windows, recurrent state beside KV and alone, a latent, sinks.
FAMILIES = ("llama", "gemma3_text", "qwen3_next", "deepseek_v3", "mamba2", "gpt_oss")
QUANTISED = ("qwen3", "gemma3_text", "qwen3_next", "deepseek_v3")

[SYSTEM, QUESTION, REPLY, OTHER] = random_prompts(21, (283, 13, 11, 600), VOCAB_SIZE)


@pytest.fixture(autouse=True)
def slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is what comes back. These models compute faster than a busy disk reads, and
    then reading is rightly left off or given up."""
    monkeypatch.setattr(DiskCache, "read_forecast_s", lambda *_: 0.0)
    monkeypatch.setattr(restores, "MIN_WAIT_S", 30.0)


class Restarts:
    """Engines of one model, one after the other, on one folder."""

    def __init__(self, model: Path, folder: Path, **order: Any) -> None:
        self._model = model
        self._order = order
        self.tier = DiskTier(str(folder / "cache"))

    def start(self, **tier: Any) -> EngineDriver:
        disk = msgspec.structs.replace(self.tier, flags=TierConfig(**tier))
        return EngineDriver(self._model, disk_tier=disk, **self._order)


def stop(engine: EngineDriver) -> None:
    engine.core.close()


def kill(engine: EngineDriver) -> None:
    """As if at a moment when the writer has caught up: nothing that only memory has is saved."""
    wait_for_writer(engine)


def wait_for_writer(engine: EngineDriver) -> None:
    while engine.core.has_work:
        engine.step()
    disk = engine.core._disk
    assert disk is not None
    assert disk._store.flush(10)


def ask(engine: EngineDriver, name: str, prompt: list[int]) -> list[int]:
    engine.add(name, prompt)
    engine.finish()
    return engine.tokens[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", [stop, kill])
def test_a_conversation_goes_on_after_a_restart(
    family: str, ends: Callable[[EngineDriver], None], tmp_path: Path
) -> None:
    model = write_model(family, tmp_path / "model")
    check_conversation(Restarts(model, tmp_path), Cold(model), is_killed=ends is kill)


@pytest.mark.each_way
def test_where_memory_is_not_the_hosts_blocks_are_restored_by_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_store, "BlockBytes", None)
    monkeypatch.setattr(choose, "choose", lambda _way: with_policy(is_in_host_memory=False))
    model = write_model("gemma3_text", tmp_path / "model")
    check_conversation(Restarts(model, tmp_path), Cold(model), is_killed=True)


@pytest.mark.parametrize("family", QUANTISED)
def test_a_quantised_conversation_goes_on_after_a_restart(family: str, tmp_path: Path) -> None:
    model = write_model(family, tmp_path / "model", has_wide_heads=True)
    order = {"kv_bits": 8, "kv_group_size": 32}
    restarts = Restarts(model, tmp_path, **order)
    check_conversation(restarts, Cold(model, **order), is_killed=True)


def check_conversation(restarts: Restarts, cold: Cold, *, is_killed: bool) -> None:
    prompt = [*SYSTEM, *QUESTION]
    policy = "write_through" if is_killed else "evict_only"
    for turn in range(3):
        engine = restarts.start(ssd_policy=policy)
        answer = ask(engine, "turn", prompt)
        cold.check(answer, prompt)
        report = engine.reports["turn"]
        if turn:
            assert report.num_cached_tokens == len(prompt) - len(REPLY) - 1, report
        prompt = [*prompt, *answer, *REPLY]
        (kill if is_killed else stop)(engine)


def test_a_stop_writes_all_to_a_slow_disk_whatever_the_queue_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("llama", tmp_path / "model")
    restarts = Restarts(model, tmp_path)
    engine, write = restarts.start(ssd_writer_queue_size=4), OsFiles.write
    ask(engine, "first", OTHER)

    def slow_write(files: OsFiles, fd: int, pieces: Sequence[memoryview]) -> int:
        time.sleep(0.05)
        return write(files, fd, pieces)

    with monkeypatch.context() as slow:
        slow.setattr(OsFiles, "write", slow_write)
        stop(engine)
    engine = restarts.start()
    ask(engine, "again", OTHER)
    assert engine.reports["again"].num_cached_tokens == len(OTHER) // 16 * 16
    stop(engine)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_what_leaves_memory_comes_back_from_the_disk(family: str, tmp_path: Path) -> None:
    model = write_model(family, tmp_path / "model")
    engine = Restarts(model, tmp_path, num_blocks=60).start()
    cold = Cold(model)
    first = ask(engine, "first", [*SYSTEM, *QUESTION])
    for number, other in enumerate(random_prompts(8, (500,) * 8, VOCAB_SIZE)):
        ask(engine, f"other-{number}", other)
    wait_for_writer(engine)
    prompt = [*SYSTEM, *QUESTION, *first, *REPLY]
    cold.check(ask(engine, "again", prompt), prompt)
    assert engine.reports["again"].num_cached_tokens >= len(SYSTEM) // 16 * 16
    stats = engine.core.stats()
    assert stats.cache_evictions_total
    assert stats.tier is not None
    assert stats.tier.counters.restored_tokens > 0
    stop(engine)


def test_what_a_running_row_has_filled_is_written_through(tmp_path: Path) -> None:
    model = write_model("gemma3_text", tmp_path / "model")
    restarts = Restarts(model, tmp_path)
    engine = restarts.start(ssd_policy="write_through")
    engine.add("a", OTHER)
    while not engine.tokens.get("a"):
        engine.step()
    for _ in range(4):  # blocks become due as they are filled, a few in each step
        engine.step()
    disk = engine.core._disk
    assert disk is not None
    assert disk._store.flush(10)
    assert engine.core.has_work, "the row still runs"
    names = {path.name for path in (tmp_path / "cache").glob("*/*/*.safetensors")}
    assert len(names) >= len(OTHER) // 16
    again = restarts.start()
    cold = Cold(model)
    cold.check(ask(again, "b", OTHER), OTHER)
    assert again.reports["b"].num_cached_tokens >= (len(OTHER) - 1) // 16 * 16
    stop(again)
    engine.finish()
    stop(engine)


def test_steps_write_in_place_what_is_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row fills a block in each step, and it is due at once."""
    monkeypatch.setattr(offloads, "MAX_WAIT_STEPS", 1)
    model = write_model("llama", tmp_path / "model")
    engine = Restarts(model, tmp_path, block_size=8).start(ssd_policy="write_through")
    prompts = random_prompts(3, [2000 + i for i in range(8)], VOCAB_SIZE)
    for i, prompt in enumerate(prompts):
        engine.add(f"long-{i}", prompt, msgspec.structs.replace(GREEDY, max_tokens=200))
    while not all(engine.tokens.values()):
        engine.step()
    held = engine.core.stats().kv_used_bytes
    disk = engine.core._disk
    assert disk is not None
    num_saves = disk._store.stats().counters.saves
    assert engine.usual_peak_bytes() < held / 3
    assert disk._store.stats().counters.saves >= num_saves + 15
    stop(engine)


@pytest.mark.parametrize(("forecast_s", "comes_back"), [(0.0, True), (1e6, False)])
def test_reading_beats_computing_or_is_not_done(
    forecast_s: float, comes_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarts = Restarts(write_model("llama", tmp_path / "model"), tmp_path)
    engine = restarts.start()
    ask(engine, "a", OTHER)
    stop(engine)
    monkeypatch.setattr(DiskCache, "read_forecast_s", lambda *_: forecast_s)
    engine = restarts.start()
    ask(engine, "b", OTHER)
    assert (engine.reports["b"].num_cached_tokens > 0) == comes_back
    stop(engine)


def test_a_folder_that_can_never_be_one_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        config = Config(tier=TierConfig(ssd_cache_dir=str(tmp_path / folder)))
        with pytest.raises(ConfigError, match=r"--ssd-cache-dir .*file.* is no folder"):
            load_message(config, tmp_path)
    assert load_message(Config(tier=TierConfig(ssd_cache_dir=str(tmp_path / "new"))), tmp_path)


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    one, other = (write_model("llama", tmp_path / str(seed), seed=seed) for seed in (1, 2))
    engine = Restarts(one, tmp_path).start()
    ask(engine, "a", SYSTEM)
    stop(engine)
    engine = Restarts(other, tmp_path).start()
    ask(engine, "a", SYSTEM)
    assert engine.reports["a"].num_cached_tokens == 0
    stop(engine)


def test_salts_do_not_share_on_disk_either(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    restarts = Restarts(model, tmp_path)
    engine = restarts.start()
    engine.add("a", SYSTEM, cache_salt="a")
    engine.finish()
    stop(engine)
    engine = restarts.start()
    for name, salt in (("other", "b"), ("same", "a")):
        engine.add(name, SYSTEM, cache_salt=salt)
        engine.finish()
    cached = [engine.reports[name].num_cached_tokens for name in ("other", "same")]
    assert cached == [0, len(SYSTEM) // 16 * 16]
    stop(engine)


def test_files_that_are_damaged_are_a_shorter_prefix(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    restarts, cold = Restarts(model, tmp_path), Cold(model)
    engine = restarts.start()
    ask(engine, "a", OTHER)
    stop(engine)
    files = sorted((tmp_path / "cache").glob("*/*/*.safetensors"))
    for number, path in enumerate(files):
        if number % 7 == 3:
            whole = bytearray(path.read_bytes())
            whole[-5] ^= 1
            path.write_bytes(whole)
    engine = restarts.start()
    cold.check(ask(engine, "b", OTHER), OTHER)
    assert engine.reports["b"].num_cached_tokens < len(OTHER) - 1
    tier = engine.core.stats().tier
    assert tier is not None
    assert tier.counters.corrupt + tier.counters.load_errors >= 1
    stop(engine)


def test_requests_that_wait_for_the_same_blocks_read_them_once(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    restarts, cold = Restarts(model, tmp_path), Cold(model)
    engine = restarts.start()
    ask(engine, "a", OTHER)
    stop(engine)
    engine = restarts.start()
    prompts = [[*OTHER, *tail] for tail in random_prompts(4, (9, 20, 3), VOCAB_SIZE)]
    for number, prompt in enumerate(prompts):
        engine.add(f"r{number}", prompt)
    engine.add("aborted", [*OTHER, 5])
    engine.abort("aborted")
    engine.finish()
    for number, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"r{number}"], prompt)
        assert engine.reports[f"r{number}"].num_cached_tokens >= len(OTHER) // 16 * 16
    tier = engine.core.stats().tier
    assert tier is not None
    assert tier.counters.loads <= len(OTHER) // 16 + 1
    stop(engine)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32])
def test_arrays_come_back_bit_by_bit(dtype: mx.Dtype) -> None:
    array = mx.random.normal((3, 2, 5, 8)).astype(mx.float32).view(mx.uint32).astype(dtype)
    for arrays in ([array], [array, array[::-1]], [array.swapaxes(1, 2)]):
        assert mx.array_equal(read_array(stacked_bytes(arrays)), mx.stack(arrays)).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32])
def test_spans_of_planes_are_copied_bit_by_bit(dtype: mx.Dtype) -> None:
    planes = [mx.random.randint(0, 1 << 16, (3, 2, 20, 8)).astype(dtype) for _ in range(2)]
    spans = [Span(0, 0, 20), Span(2, 16, 4), Span(1, 3, 1)]
    copied = copy_spans(PlaneCopies(BACKEND.copy_heads), planes, spans)
    for span, copy in zip(spans, copied, strict=True):
        stop = span.start + span.num_tokens
        wanted = mx.stack([plane[span.slot, :, span.start : stop] for plane in planes])
        assert mx.array_equal(read_array(copy), wanted).item()


@observes("TierConfig.ssd_policy", "TierConfig.no_ssd")
def test_ssd_policy_says_when_blocks_are_written(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")

    def num_files(name: str, when: Callable[[EngineDriver], None], **flags: Any) -> int:
        config = Config(tier=TierConfig(ssd_cache_dir=str(tmp_path / name), **flags))
        engine = EngineDriver(model, disk_tier=load_message(config, model).disk_tier)
        ask(engine, "a", SYSTEM)
        if engine.core._disk is not None:
            when(engine)
        return len(list((tmp_path / name).glob("*/*/*.safetensors")))

    num_blocks = (len(SYSTEM) + GREEDY.max_tokens - 1) // 16 + 1
    assert num_files("evict", kill) == 0
    assert num_files("evict", stop, ssd_policy="evict_only") == num_blocks
    assert num_files("through", kill, ssd_policy="write_through") == num_blocks
    assert num_files("off", stop, no_ssd=True) == 0
    assert not (tmp_path / "off").exists()
