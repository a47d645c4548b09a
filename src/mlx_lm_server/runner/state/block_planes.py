"""Where the blocks of the prefix cache lie: segments of the pool.

    segment 2, layer 0   plane 0  keys    [num_blocks, kv_heads, block_size, key_dim]
                         plane 1  values  [num_blocks, kv_heads, block_size, value_dim]

Only layers that keep every token lie in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import mlx.core as mx

from mlx_lm_server.core.block import Place
from mlx_lm_server.runner.state.kv_storage import LayerShape

Planes = list[mx.array]


class BlockPlanes:
    """Owned by the block store. `layers` are the numbers of those in blocks, `token_bytes` is what
    a token takes in all of them; `unwritten` makes arrays."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        block_size: int,
        unwritten: Callable[[tuple[int, ...], mx.Dtype], mx.array],
    ) -> None:
        self._shapes = shapes
        self._unwritten = unwritten
        self.block_size = block_size
        self.layers = [number for number, shape in enumerate(shapes) if shape.ring is None]
        self.token_bytes = sum(shapes[number].bytes_per_token for number in self.layers)
        self._segments: dict[int, dict[int, Planes]] = {}

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        segments = self._segments.values()
        return sum(p.nbytes for layers in segments for planes in layers.values() for p in planes)

    def create(self, segment_id: int, num_blocks: int) -> None:
        """Blocks are read as far as they were written."""
        self._segments[segment_id] = {
            layer: [
                self._unwritten(plane.shape(num_blocks, self.block_size), plane.dtype)
                for plane in self._shapes[layer].planes
            ]
            for layer in self.layers
        }

    def drop(self, segment_id: int) -> None:
        del self._segments[segment_id]

    def segment(self, segment_id: int) -> dict[int, Planes]:
        """The planes of each layer."""
        return self._segments[segment_id]

    def gather(self, layer: int, places: Sequence[Place]) -> Iterator[Planes]:
        """Per plane the blocks in their order, each part `[n, kv_heads, block_size, width]`."""
        runs = [
            (segment_id, [place.number for place in run])
            for segment_id, run in groupby(places, key=lambda place: place.segment_id)
        ]
        for number in range(len(self._shapes[layer].planes)):
            yield [
                _take(self._segments[segment_id][layer][number], run) for segment_id, run in runs
            ]


def _take(plane: mx.array, numbers: Sequence[int]) -> mx.array:
    """Those blocks of a segment's plane; a view of it where they lie side by side."""
    first, last = numbers[0], numbers[-1]
    if list(numbers) == list(range(first, last + 1)):
        return plane[first : last + 1]
    return plane[mx.array(list(numbers), mx.int32)]
