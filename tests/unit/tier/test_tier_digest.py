"""Which model it is: another byte of weights or config is another model, a copy is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlx_lm_server.tier import model_digest, namespace_digest
from mlx_lm_server.tier.model_digest import PAGE_BYTES, SAMPLED_PAGES

HEADER = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}'


def make_model(folder: Path, weights_bytes: int = 100_000) -> Path:
    folder.mkdir()
    header = HEADER % (weights_bytes, weights_bytes)
    data = bytes(i % 251 for i in range(weights_bytes))
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    (folder / "config.json").write_text('{"rope_theta": 10000}')
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def flip(path: Path, at: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("at", [9, 60, 5000, 50_000, -1])
def test_another_byte_is_another_model(model: Path, at: int) -> None:
    before = model_digest(model)
    flip(model / "model.safetensors", at)
    assert model_digest(model) != before


def test_a_copy_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert model_digest(copy) == model_digest(model)


def test_the_config_and_every_shard_count(model: Path) -> None:
    seen = {model_digest(model)}
    (model / "config.json").write_text('{"rope_theta": 1000000}')
    seen.add(model_digest(model))
    shutil.copy(model / "model.safetensors", model / "model-2.safetensors")
    seen.add(model_digest(model))
    (model / "adapter_config.json").write_text("{}")
    seen.add(model_digest(model))
    (model / "README.md").write_text("no part of it")
    assert len(seen | {model_digest(model)}) == 4


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    model = make_model(tmp_path / "large", weights_bytes=2 * PAGE_BYTES * (SAMPLED_PAGES + 50))
    before = model_digest(model)
    flip(model / "model.safetensors", -1)
    assert model_digest(model) != before


def test_the_cache_spares_the_reading_until_the_file_changes(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "digests.json"
    before = model_digest(model, cache)
    weights = model / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    flip(weights, 5000)
    os.utime(weights, ns=times)
    assert model_digest(model, cache) == before, "same path, size and time"
    os.utime(weights, ns=(times[0], times[1] + 1))
    assert model_digest(model, cache) == model_digest(model) != before


@pytest.mark.parametrize("contents", [b"", b"not json", b"[]", b'{"a": 1}'])
def test_a_broken_cache_is_no_cache(model: Path, tmp_path: Path, contents: bytes) -> None:
    cache = tmp_path / "digests.json"
    cache.write_bytes(contents)
    assert model_digest(model, cache) == model_digest(model)
    assert model_digest(model, tmp_path / "digests.json" / "below a file") == model_digest(model)


def test_names_and_values_of_parts_do_not_run_together() -> None:
    digests = {
        namespace_digest({"model": "ab", "rank": "c"}),
        namespace_digest({"model": "a", "rank": "bc"}),
        namespace_digest({"modelab": "", "rank": "c"}),
        namespace_digest({"model": b"ab"}),
    }
    assert len(digests) == 4
    assert namespace_digest({"a": "1", "b": "2"}) == namespace_digest({"b": "2", "a": b"1"})
