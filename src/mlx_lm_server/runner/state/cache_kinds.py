"""What a model keeps of the tokens it has seen, layer by layer.

Nothing is believed of a family's name: the model makes its own caches (`make_prompt_cache`), runs a
few tokens through them, and what lies in them afterwards is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_lm_server.runner.state.kv_storage import LayerShape


class UnbatchableState(Exception):
    """The model keeps state of a kind that rows of a batch cannot share; says which."""


@dataclass(frozen=True, slots=True)
class ArrayShape:
    """One array of recurrent or convolution state, per row."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        size = self.dtype.size
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """State that does not grow with the tokens; None for an entry that stays empty."""

    arrays: tuple[ArrayShape | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array is not None)


Part = LayerShape | RecurrentState


@dataclass(frozen=True, slots=True)
class LayerState:
    """The parts of one entry of the model's list of caches; more than one in a CacheList."""

    parts: tuple[Part, ...]
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class ModelState:
    """All that a model keeps per row, in the order of its caches."""

    layers: tuple[LayerState, ...]

    @property
    def kv(self) -> list[LayerShape]:
        return [p for layer in self.layers for p in layer.parts if isinstance(p, LayerShape)]

    @property
    def recurrent(self) -> list[RecurrentState]:
        return [p for layer in self.layers for p in layer.parts if isinstance(p, RecurrentState)]

    @property
    def kinds(self) -> list[str]:
        """In words, for the log and the table of models."""
        kinds = set()
        for part in self.kv:
            kinds.add("full KV" if part.window is None else f"window of {part.window}")
        if self.recurrent:
            kinds.add("recurrent state")
        return sorted(kinds)

    def nest(self, kv: Sequence[Any], recurrent: Sequence[Any]) -> list[Any]:
        """The list of caches that the model wants, made of one cache for each part."""
        from mlx_lm.models.cache import CacheList

        next_kv, next_recurrent = iter(kv), iter(recurrent)
        caches = []
        for layer in self.layers:
            parts = [
                next(next_kv if isinstance(part, LayerShape) else next_recurrent)
                for part in layer.parts
            ]
            caches.append(CacheList(*parts) if layer.is_list else parts[0])
        return caches

    def recurrent_of(self, caches: Sequence[Any]) -> list[Any]:
        """The recurrent parts among caches that `nest` made."""
        found = []
        for layer, cache in zip(self.layers, caches, strict=True):
            entries = cache.caches if layer.is_list else [cache]
            pairs = zip(layer.parts, entries, strict=True)
            found += [entry for part, entry in pairs if isinstance(part, RecurrentState)]
        return found


def read_state(model: Module) -> ModelState:
    """Run some tokens and look. Raises UnbatchableState."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    snapshots = []
    for ids in ([1, 2, 3], [4]):
        mx.eval(model(mx.array([ids]), cache=caches))
        snapshots.append(tuple(_read_layer(n, cache) for n, cache in enumerate(caches)))
    for number, (before, after) in enumerate(zip(*snapshots, strict=True)):
        if before != after:
            raise UnbatchableState(f"layer {number} keeps arrays that change their shape")
    return ModelState(snapshots[-1])


def _read_layer(number: int, cache: Any) -> LayerState:
    from mlx_lm.models.cache import CacheList

    if isinstance(cache, CacheList):
        return LayerState(tuple(_read_part(number, c) for c in cache.caches), is_list=True)
    return LayerState((_read_part(number, cache),))


def _read_part(number: int, cache: Any) -> Part:
    from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

    if type(cache) is ArraysCache:
        return RecurrentState(tuple(_shape_of(array) for array in cache.cache))
    if type(cache) is KVCache:
        return _kv_shape(number, cache, None)
    if type(cache) is RotatingKVCache and not cache.keep:
        return _kv_shape(number, cache, cache.max_size)
    raise UnbatchableState(f"layer {number} keeps its state in a {type(cache).__name__}")


def _kv_shape(number: int, cache: Any, window: int | None) -> LayerShape:
    keys, values = cache.keys, cache.values
    if keys is None or values is None:
        raise UnbatchableState(f"layer {number} keeps no K and V")
    if keys.dtype != values.dtype or keys.shape[1] != values.shape[1]:
        raise UnbatchableState(f"layer {number} keeps K and V of different kinds")
    return LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], window, keys.dtype)


def _shape_of(array: mx.array | None) -> ArrayShape | None:
    return None if array is None else ArrayShape(tuple(array.shape[1:]), array.dtype)
