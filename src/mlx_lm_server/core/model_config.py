"""What a model's config.json says, in whatever way it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The language model's own section in the config of a multi-modal one; it wins over the top level.
NESTED_SECTIONS = ("text_config", "language_config", "llm_config")
LEGACY_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "hidden_size": ("n_embd", "d_model", "hidden_dim"),
    "max_position_embeddings": (
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_seq_length",
        "model_max_length",
        "seq_length",
        "block_size",
    ),
}


def sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where to look for the language model's fields, the first first."""
    nested = [config[key] for key in NESTED_SECTIONS if isinstance(config.get(key), dict)]
    return [*nested, config]


def field(config: Mapping[str, Any], name: str) -> Any:
    """A field of the language model, by its own or a legacy name; None where it is not given."""
    for section in sections(config):
        for key in (name, *LEGACY_NAMES.get(name, ())):
            if section.get(key) is not None:
                return section[key]
    return None


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model is made for, where it says so."""
    stated = field(config, "max_position_embeddings")
    is_number = isinstance(stated, int) and not isinstance(stated, bool) and stated > 0
    return stated if is_number else None
