from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.submitting import Submitting, Trial
from mlx_lm_server.engine.profiles import load_profile, profile_path, save_profile

SMALL, LARGE = Trial(1 << 20, 0.01, 0.008, 0, 1 << 20), Trial(1 << 28, 0.01, 0.012, 0, 1 << 28)
COSTS = StepCosts(base_s=0.01, per_prefill_token_s=0.002)
MEASURED = Measured(2, COSTS, ForwardBytes(4096, 12.5, 512), 5e9, Submitting(SMALL, LARGE))
FACTS = {"server": "1", "cores": "2"}


def model(folder: Path, size: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model.safetensors").write_bytes(bytes(size))
    return folder


@pytest.mark.parametrize("measured", [MEASURED, replace(MEASURED, submitting=None)])
def test_what_was_measured_comes_back(tmp_path: Path, measured: Measured) -> None:
    path = profile_path(model(tmp_path / "m"), FACTS, tmp_path)
    assert load_profile(path) is None
    save_profile(path, measured)
    assert load_profile(path) == measured
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_profile_is_of_one_model_machine_and_version(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    path = profile_path(folder, FACTS, tmp_path)
    assert profile_path(model(tmp_path / "copy"), FACTS, tmp_path) == path
    assert profile_path(folder, {**FACTS, "cores": "4"}, tmp_path) != path
    assert profile_path(folder, {**FACTS, "server": "2"}, tmp_path) != path
    assert profile_path(model(folder, size=101), FACTS, tmp_path) != path


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: {},
        lambda found: [],
        lambda found: {**found, "costs": []},
        lambda found: {**found, "costs": None},
        lambda found: {**found, "num_threads": -1},
        lambda found: {**found, "num_threads": "many"},
        lambda found: {**found, "costs": {"base_s": 0}},
        lambda found: {**found, "costs": {"mood": 1}},
        lambda found: {**found, "forward_bytes": {**found["forward_bytes"], "per_token": 0}},
        lambda found: {**found, "forward_bytes": {**found["forward_bytes"], "per_pair": -2.0}},
        lambda found: {**found, "copy_bytes_per_s": 0},
        lambda found: {k: v for k, v in found.items() if k != "copy_bytes_per_s"},
        lambda found: {**found, "submitting": {}},
        lambda found: {**found, "submitting": {**found["submitting"], "large": {"late_s": 1}}},
        lambda found: {k: v for k, v in found.items() if k != "submitting"},
        lambda found: found["submitting"]["small"].update(late_s=-1.0) or found,
    ],
)
def test_a_profile_that_cannot_be_believed_is_none(tmp_path: Path, damage: Any) -> None:
    path = profile_path(model(tmp_path / "m"), FACTS, tmp_path)
    save_profile(path, MEASURED)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert load_profile(path) is None


def test_a_folder_that_cannot_be_written_to_costs_a_measurement_only(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file")
    path = profile_path(model(tmp_path / "m"), FACTS, tmp_path)
    save_profile(path, MEASURED)
    assert not path.exists()
