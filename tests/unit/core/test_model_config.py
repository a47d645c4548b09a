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


@pytest.mark.parametrize("stated", [None, 0, -1, "many", True])
def test_a_context_that_is_no_count_is_not_stated(stated: Any):
    assert model_config.context_tokens({"max_position_embeddings": stated}) is None
