from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.errors import ModelError, ModelNotFoundError
from mlx_lm_server.server.models.model_files import (
    NANO_FOLDER,
    read_facts,
    read_json,
    resolve_adapter,
    resolve_model,
)


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_nano_is_in_the_package() -> None:
    assert resolve_model("nano") == NANO_FOLDER


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(write(tmp_path, config={}))) == tmp_path


@pytest.mark.parametrize("name", ["./nothing", "/nothing", "~/nothing/at/all", "a/b/c"])
def test_a_path_that_is_none_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        resolve_model(name)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_end_tokens_are_merged_from_all_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        config={"eos_token_id": 1, "text_config": {"eos_token_id": [2]}},
        generation_config={"eos_token_id": [3, 4]},
    )
    assert read_facts(tmp_path).eos_ids == {1, 2, 3, 4}


def test_the_context_of_the_text_part_goes_first(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 10, "text_config": {"max_position_embeddings": 20}}
    assert read_facts(write(tmp_path, config=config)).context_tokens == 20


def test_the_tokenizers_length_counts_where_the_model_states_no_context(tmp_path: Path) -> None:
    write(tmp_path, config={}, tokenizer_config={"model_max_length": 2048})
    assert read_facts(tmp_path).context_tokens == 2048
    write(tmp_path, tokenizer_config={"model_max_length": int(1e30)})
    assert read_facts(tmp_path).context_tokens is None
    write(tmp_path, config={"n_ctx": 512}, tokenizer_config={"model_max_length": 2048})
    assert read_facts(tmp_path).context_tokens == 512


def test_sampling_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"temperature": 1, "top_k": 20, "top_p": None})
    defaults = read_facts(tmp_path).defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1.0, 20, None)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        read_json(tmp_path / "config.json")


def test_an_adapter_is_a_folder_with_its_config(tmp_path: Path) -> None:
    assert resolve_adapter(None) is None
    with pytest.raises(ModelNotFoundError):
        resolve_adapter(str(tmp_path))
    assert resolve_adapter(str(write(tmp_path, adapter_config={}))) == str(tmp_path)
