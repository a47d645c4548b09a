"""What a model's config.json says, in whatever way it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# Kinds of rotary embedding whose config states the context with the scaling in it, or has none.
UNSCALED_ROPE_TYPES = frozenset({"default", "llama3", "longrope", "su", "mrope", "proportional"})
# Families, by how their model types begin, that state the context with the scaling in it.
SCALED_ALREADY = ("gemma",)
# More than any model's; a number beyond it is a stand-in for "no limit" or a mistake.
MAX_CONTEXT_TOKENS = 10**9


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


def num_heads(config: Mapping[str, Any]) -> int | None:
    """Returns how many heads of queries a layer has at most; None where config.json does not
    say."""
    stated = field(config, "num_attention_heads")
    counts = stated if isinstance(stated, list) else [stated]
    return max((int(n) for n in counts if _positive(n) is not None), default=None)


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model is made for, with what its rotary embedding is scaled by; None
    where config.json does not say."""
    stated = _stated_context(config)
    if stated is None or str(field(config, "model_type") or "").startswith(SCALED_ALREADY):
        return stated
    scaled = [_scaled_context(stated, scaling) for scaling in _rope_scalings(config)]
    return max((tokens for tokens in scaled if tokens is not None), default=stated)


def _stated_context(config: Mapping[str, Any]) -> int | None:
    # Cohere's `max_position_embeddings` is the length of the training's first part.
    for name in ("model_max_length", "max_position_embeddings"):
        stated = field(config, name)
        if isinstance(stated, int) and _positive(stated) is not None:
            return stated
    return None


def _rope_scalings(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The scalings that config.json names: one, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        given = field(config, name)
        if isinstance(given, dict):
            nested = [value for value in given.values() if isinstance(value, dict)]
            return nested or [given]
    return []


def _scaled_context(stated: int, scaling: Mapping[str, Any]) -> int | None:
    """What a scaling makes of the stated context; None where it leaves that as it is."""
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = _positive(scaling.get("factor"))
    if kind is None or kind in UNSCALED_ROPE_TYPES or factor is None or factor <= 1:
        return None
    original = _positive(scaling.get("original_max_position_embeddings"))
    if original is None:
        return int(stated * factor)
    is_yarn = str(kind).endswith("yarn")
    is_counted = stated >= original * factor
    return int(original * factor) if is_yarn or not is_counted else None


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < MAX_CONTEXT_TOKENS else None
