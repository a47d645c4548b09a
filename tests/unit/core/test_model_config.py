from __future__ import annotations

from typing import Any

import pytest

from mlx_lm_server.core import model_config


@pytest.mark.parametrize("section", model_config.NESTED_SECTIONS)
def test_the_language_models_section_wins_over_the_top_level(section: str):
    config = {"max_position_embeddings": 1, "num_hidden_layers": 2}
    config |= {section: {"max_position_embeddings": 4096}}
    assert model_config.context_tokens(config) == 4096
    assert model_config.field(config, "num_hidden_layers") == 2


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"n_layer": 12}, "num_hidden_layers", 12),
        ({"n_head": 8}, "num_attention_heads", 8),
        ({"n_embd": 768}, "hidden_size", 768),
        ({"n_positions": 1024}, "max_position_embeddings", 1024),
        ({"text_config": {"n_layer": 3}, "num_hidden_layers": 9}, "num_hidden_layers", 3),
        ({"text_config": None, "n_layer": 3}, "num_hidden_layers", 3),
    ],
)
def test_legacy_names_are_read(config: dict[str, Any], name: str, value: int):
    assert model_config.field(config, name) == value


@pytest.mark.parametrize("stated", [None, 0, -1, "many", True, 10**30])
def test_a_context_that_is_no_count_is_not_stated(stated: Any):
    assert model_config.context_tokens({"max_position_embeddings": stated}) is None


def scaled(kind: str, factor: Any, stated: int = 4096, **rest: Any) -> int | None:
    scaling = {"rope_type": kind, "factor": factor, **rest}
    config = {"max_position_embeddings": stated, "rope_scaling": scaling}
    return model_config.context_tokens(config)


def test_yarn_extends_the_original_context_by_its_factor():
    assert scaled("yarn", 4.0, 40960, original_max_position_embeddings=32768) == 131072
    assert scaled("yarn", 40, 163840, original_max_position_embeddings=4096) == 163840
    assert scaled("deepseek_yarn", 2, original_max_position_embeddings=2048) == 4096
    assert scaled("yarn", 2) == 8192


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_other_scalings_multiply_what_is_stated_but_not_twice(kind: str):
    assert scaled(kind, 2.5) == 10240
    assert scaled(kind, 4, 4096, original_max_position_embeddings=1024) == 4096
    assert scaled(kind, 4, 1024, original_max_position_embeddings=1024) == 4096


@pytest.mark.parametrize("kind", ["default", "llama3", "longrope", "su", "mrope", "proportional"])
def test_scalings_that_are_in_the_stated_context_are_not_counted_again(kind: str):
    assert scaled(kind, 8.0, original_max_position_embeddings=8192) == 4096


@pytest.mark.parametrize(
    "factor", [0, -4.0, 1.0, float("nan"), float("inf"), "4", None, True, [4], 10**30]
)
def test_a_factor_that_extends_nothing_is_left_out(factor: Any):
    assert scaled("linear", factor) == 4096
    assert scaled("yarn", factor, original_max_position_embeddings=2048) == 4096


def test_an_original_context_that_is_no_count_is_left_out():
    assert scaled("yarn", 2, original_max_position_embeddings="many") == 8192


def test_the_older_and_the_nested_ways_to_write_a_scaling_are_read():
    old = {"max_position_embeddings": 1024, "rope_scaling": {"type": "linear", "factor": 2}}
    assert model_config.context_tokens(old) == 2048
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}
    layers = {"sliding_attention": {"rope_type": "default"}, "full_attention": yarn}
    nested = {"text_config": {"max_position_embeddings": 1024, "rope_parameters": layers}}
    assert model_config.context_tokens(nested) == 4096
    for no_scaling in (None, {}, [], "yarn", {"factor": 2}, {"rope_theta": 1e4}):
        config = {"max_position_embeddings": 1024, "rope_scaling": no_scaling}
        assert model_config.context_tokens(config) == 1024


def test_a_family_that_states_its_context_scaled_is_not_scaled_again():
    config = {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    }
    assert model_config.context_tokens(config) == 131072


def test_a_context_that_the_config_calls_the_models_own_wins():
    config = {"max_position_embeddings": 8192, "model_max_length": 131072}
    assert model_config.context_tokens(config) == 131072
