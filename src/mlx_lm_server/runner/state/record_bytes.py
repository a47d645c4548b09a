"""How blocks and checkpoints look as records of the tier: few tensors, arrays of one shape stacked.

block   per kind of plane   [planes, kv_heads, tokens, width]
state   per kind of array   [arrays, …]
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from mlx_lm_server.native.memory import unwritten_bytes
from mlx_lm_server.runner.state.cache_kinds import RecurrentState
from mlx_lm_server.runner.state.kv_storage import LayerShape
from mlx_lm_server.runner.state.plane_spans import PlaneCopies, Span, bytes_of
from mlx_lm_server.tier import Record, Tensor

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U8": mx.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Key = TypeVar("Key", bound=Hashable)


# The planes, as (layer, number of the plane), of each tensor of a block's record.
PlaneGroups = Sequence[Sequence[tuple[int, int]]]


class ArraySpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, array: mx.array) -> ArraySpec:
        return cls(tuple(array.shape), array.dtype)


class RecordShapes:
    """Only layers that keep every token are in blocks."""

    def __init__(
        self, layers: Sequence[LayerShape], recurrent: Sequence[RecurrentState], block_size: int
    ) -> None:
        self._layers = layers
        self._recurrent = recurrent
        self._block_size = block_size
        planes = [
            (layer, number, plane)
            for layer, shape in enumerate(layers)
            if shape.ring is None
            for number, plane in enumerate(shape.planes)
        ]
        groups = _grouped([plane for _, _, plane in planes])
        self.plane_groups: PlaneGroups = [[planes[n][:2] for n in group] for group in groups]
        self._group_planes = [planes[group[0]][2] for group in groups]

    @property
    def can_be_stored(self) -> bool:
        """Whether all dtypes have a name on disk."""
        specs = [*self._block_specs(1), *self.of_state(1)]
        return all(spec.dtype in DTYPE_NAMES for spec in specs)

    def describe(self) -> str:
        """Equal texts mean that records have the same meaning."""
        return f"{self._block_size} {self._layers!r} {self._recurrent!r}"

    def of_state(self, num_tokens: int) -> list[ArraySpec]:
        """The arrays of a checkpoint after so many tokens, in their order."""
        specs = []
        for layer in self._layers:
            if layer.ring is not None:
                held = min(num_tokens, layer.ring)
                specs += [ArraySpec((p.kv_heads, held, p.width), p.dtype) for p in layer.planes]
        for part in self._recurrent:
            specs += [ArraySpec((1, *a.shape), a.dtype) for a in part.arrays if a is not None]
        return specs

    def grouped(self, specs: Sequence[ArraySpec]) -> list[list[int]]:
        """The numbers of the arrays that each tensor of a state's record holds."""
        return _grouped(specs)

    def fits(self, record: Record) -> bool:
        """Whether this model could have made it. The tier has checked its bytes."""
        if record.kind == "block":
            wanted = self._block_specs(len(record.token_ids))
        else:
            specs = self.of_state(record.num_tokens)
            groups = self.grouped(specs)
            wanted = [
                ArraySpec((len(group), *specs[group[0]].shape), specs[group[0]].dtype)
                for group in groups
            ]
        found = [(tensor.shape, DTYPES.get(tensor.dtype)) for tensor in record.tensors]
        return found == [tuple(spec) for spec in wanted]

    def _block_specs(self, num_tokens: int) -> list[ArraySpec]:
        return [
            ArraySpec((len(group), plane.kv_heads, num_tokens, plane.width), plane.dtype)
            for group, plane in zip(self.plane_groups, self._group_planes, strict=True)
        ]


def stacked_bytes(arrays: Sequence[mx.array]) -> Tensor:
    """A copy of arrays of one shape, with nothing of them in it."""
    first = arrays[0]
    data, end = unwritten_bytes(len(arrays) * first.nbytes), 0
    for array in arrays:
        start, end = end, end + array.nbytes
        data[start:end] = bytes_of(array)
    return Tensor(DTYPE_NAMES[first.dtype], (len(arrays), *first.shape), data.toreadonly())


def copy_spans(
    copies: PlaneCopies, planes: Sequence[mx.array], spans: Sequence[Span]
) -> list[Tensor]:
    """Each span of planes of one shape, `[slots, kv_heads, places, width]`, as a tensor
    `[planes, kv_heads, num_tokens, width]`. The planes are computed."""
    _, kv_heads, _, width = planes[0].shape
    name = DTYPE_NAMES[planes[0].dtype]
    return [
        Tensor(name, (len(planes), kv_heads, span.num_tokens, width), data)
        for span, data in zip(spans, copies.out(planes, spans), strict=True)
    ]


def tensors_of(array: mx.array) -> list[Tensor]:
    """Copies of the first axis' parts, of an array that is computed and lies in order."""
    name, shape = DTYPE_NAMES[array.dtype], tuple(array.shape[1:])
    data = bytes_of(array)
    size = len(data) // max(1, array.shape[0])
    return [
        Tensor(name, shape, bytes(data[number * size : (number + 1) * size]))
        for number in range(array.shape[0])
    ]


def read_array(tensor: Tensor) -> mx.array:
    raw = mx.array(cast(Any, memoryview(tensor.data)))
    return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _grouped(keys: Iterable[Key]) -> list[list[int]]:
    """Positions of equal keys, in the order of the first of each."""
    groups: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return list(groups.values())
