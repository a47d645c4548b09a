"""`mx.compile` for functions that meet ever new shapes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


class BoundedCompile:
    """A compiled function keeps one trace per combination of input shapes for as long as it lives;
    this one is made anew after `max_shapes` of them."""

    def __init__(self, function: Callable[..., mx.array], max_shapes: int = 512) -> None:
        self._function = function
        self._max_shapes = max_shapes
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._compiled = mx.compile(function)

    def __call__(self, *inputs: mx.array) -> mx.array:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._seen:
            if len(self._seen) >= self._max_shapes:
                self._seen.clear()
                self._compiled = mx.compile(self._function)
            self._seen.add(shapes)
        return self._compiled(*inputs)
