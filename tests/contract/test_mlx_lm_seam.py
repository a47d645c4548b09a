"""What we rely on in mlx-lm. A failure here says in a sentence what has moved."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import activations, base, cache

from mlx_lm_server.runner.seam.attention import LayerCache
from mlx_lm_server.runner.seam.rectangular import ChunkCache, DecodeRowsCache

from .models_table import examine
from .tiny_configs import families


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_models_import_attention_by_name_from_base() -> None:
    """Replacing it before a model's module is imported reaches every layer."""
    replaced = base.scaled_dot_product_attention
    assert parameters_of(replaced)[:6] == ["queries", "keys", "values", "cache", "scale", "mask"]
    for family in ("llama", "qwen3", "gpt_oss", "gemma3_text", "gemma4_text"):
        module = importlib.import_module(f"mlx_lm.models.{family}")
        assert module.scaled_dot_product_attention is replaced, (
            f"{family} no longer takes its attention from mlx_lm.models.base"
        )


def test_swiglu_is_a_function_of_gate_and_x() -> None:
    assert parameters_of(activations.swiglu) == ["gate", "x"]


def test_masks_are_asked_of_the_cache() -> None:
    """`create_attention_mask` hands `return_array` and `window_size` to the cache by name."""

    class Asked:
        def make_mask(self, n: int, **options: Any) -> tuple[int, list[str]]:
            return n, sorted(options)

    assert base.create_attention_mask(mx.zeros((2, 5, 8)), Asked(), window_size=3) == (
        5,
        ["return_array", "window_size"],
    )
    assert base.create_ssm_mask(mx.zeros((2, 5, 8)), cache.ArraysCache(1)) is None


def test_our_caches_have_what_models_use_of_mlx_lms() -> None:
    used = {"offset", "make_mask", "update_and_fetch", "keys_and_values"}
    assert used <= set(dir(cache.KVCache())), "KVCache has lost a member that models use"
    for ours in (LayerCache, DecodeRowsCache, ChunkCache):
        assert used - {"offset"} <= set(dir(ours))


def test_a_rotating_cache_states_its_window() -> None:
    rotating = cache.RotatingKVCache(max_size=24)
    assert (rotating.max_size, rotating.keep) == (24, 0)


def test_recurrent_state_is_a_list_of_arrays_without_padding() -> None:
    state = cache.ArraysCache(2)
    assert state.cache == [None, None]
    assert state.lengths is None
    assert state.left_padding is None
    state.advance(3)


def test_a_cache_list_keeps_its_caches_in_order() -> None:
    first, second = cache.KVCache(), cache.ArraysCache(1)
    assert list(cache.CacheList(first, second).caches) == [first, second]


@pytest.mark.parametrize(
    ("family", "served"),
    [
        ("cohere", "packed"),
        ("exaone4", "packed"),
        ("gpt_neox", "packed"),
        ("kimi_linear", "split"),
        ("longcat_flash", "split"),
        ("nemotron_h", "split"),
        ("rwkv7", "split"),
        ("gpt_bigcode", "alone"),
    ],
)
def test_a_family_is_served_as_the_table_of_models_says(family: str, served: str) -> None:
    row = examine(family)
    assert row.served == served, str(row)


def test_the_walk_over_families_leaves_out_what_is_none() -> None:
    for family in families():
        spec = importlib.util.find_spec(f"mlx_lm.models.{family}")
        assert spec is not None
        assert spec.origin is not None
        with open(spec.origin) as source:
            text = source.read()
        assert "ModelArgs" in text, f"{family} is no family: add it to PARTS"
