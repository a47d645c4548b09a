"""Attention over packed tokens: the seam to mlx-lm's models.

A model's layer believes that it holds mlx-lm's KV cache and calls, with T packed tokens,

    queries, keys = rope(queries, offset=cache.offset), rope(keys, offset=cache.offset)
    keys, values = cache.update_and_fetch(keys, values)             # [T, kv_heads, 1, head_dim]
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=…, mask=…)

`LayerCache` hands the new K and V through to the layer's attention (`backend.LayerAttention`); the
attention function, which `patches` puts in the place of mlx-lm's before a model's module is first
imported, sees the cache and regroups the tokens by slab and by chunk. So one forward serves decode
rows and chunks alike, and nothing is padded. A layer without a cache that attends to another
layer's K and V (Gemma 4) is known by the arrays it was handed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_lm_server.runner.backend import AttentionKernel
from mlx_lm_server.runner.seam.rectangular import ChunkCache
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.step_layout import StepLayout


class UnknownMask(Exception):
    """A model attends with a mask of its own making, which packed tokens cannot honour."""


# What a model's code raises when it meets a cache, an offset or a mask it was not written for.
SEAM_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    UnknownMask,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class WindowMask:
    """Stands for a mask that lets a token see the last `window` ones, where K and V are whole."""

    window: int


class LayerCache:
    """What one layer of an mlx-lm model takes for its KV cache. Lives as long as the model; each
    forward begins with `begin` and ends with `end`."""

    def __init__(self, layer: int, storage: KVStorage, kernel: AttentionKernel) -> None:
        self._window = storage.layers[layer].window
        self._attention = kernel.of_layer(storage, layer)
        self._layout: StepLayout | None = None
        self._handed: tuple[mx.array, mx.array] | None = None

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        self._handed = None
        self._attention.begin(layout)

    def end(self) -> None:
        if self._handed is not None:
            _owners.pop(id(self._handed[0]), None)
        self._handed = None
        self._attention.end()

    @property
    def layout(self) -> StepLayout:
        assert self._layout is not None
        return self._layout

    @property
    def offset(self) -> mx.array:
        """Returns each token's position, or the next once it is written, as in mlx-lm."""
        return self.layout.offsets if self._handed is None else self.layout.ends

    def make_mask(self, *_args: Any, window_size: int | None = None, **_kwargs: Any) -> Any:
        """Masks belong to the groups of tokens; what the model needs to know is the window."""
        if window_size is None or window_size == self._window:
            return None
        return WindowMask(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Takes K and V of the packed tokens, `[T, kv_heads, 1, head_dim]`, and hands them on."""
        self._handed = keys, values
        self._attention.put(keys, values)
        _owners[id(keys)] = self
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Returns what the layer wrote in this forward, for layers that share it (Gemma 3n)."""
        assert self._handed is not None
        return self._handed

    def attend(
        self, queries: mx.array, scale: float, mask: Any = None, sinks: mx.array | None = None
    ) -> mx.array:
        """Queries `[T, heads, 1, dim]` → outputs of the same shape, token by token."""
        if mask is not None and not isinstance(mask, WindowMask):
            raise UnknownMask("it makes its own attention masks")
        window = self._window if mask is None else mask.window
        return self._attention.attend(queries, scale, window, sinks)

    def write_unattended(self) -> None:
        """Writes what was handed on and not attended to. Raises LookupError in a trace."""
        self._attention.settle()


# Which layer handed out an array of K, by the array's id, within one forward of the main thread.
_owners: dict[int, LayerCache] = {}


def instead_of(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Returns what stands in for mlx-lm's `scaled_dot_product_attention`: for caches of ours the
    attention of their layer, for others the original."""

    def scaled_dot_product_attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        owner = cache if isinstance(cache, LayerCache) else _owners.get(id(keys))
        if owner is not None:
            return owner.attend(queries, scale, mask, sinks)
        if isinstance(cache, ChunkCache):
            out = cache.attend(queries, keys, values, scale, mask, sinks)
            if out is not None:
                return out
        return original(queries, keys, values, cache, scale, mask, sinks)

    return scaled_dot_product_attention
