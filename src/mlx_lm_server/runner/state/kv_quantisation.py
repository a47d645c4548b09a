"""K and V in 8 or 4 bits: MLX's affine quantisation, in groups along a token's own numbers.

    x ≈ code · scale + bias      one scale and bias for each `group_size` numbers of one head

A group never reaches over a token, so a token reads back the same whatever was written with it:
chunk by chunk, one by one, or moved to another slot.

    codes    [..., width · bits / 32]    uint32, the lowest bits first
    scales   [..., width / group_size]   in the model's own type, biases alike
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_lm_server.errors import UnsupportedModelError

if TYPE_CHECKING:
    from mlx_lm_server.runner.state.kv_storage import LayerShape

# What auto tries where the group that was asked for does not divide a head.
SMALLEST_GROUP = 32


@dataclass(frozen=True, slots=True)
class Quantisation:
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.bits}-bit, groups of {self.group_size}"

    def divides(self, width: int) -> bool:
        return width > 0 and width % self.group_size == 0

    def pack(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`[..., width]` → codes, scales and biases."""
        codes, scales, biases = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        return codes, scales, biases


@dataclass(frozen=True, slots=True)
class PackedKV:
    """K or V as it is stored; what it stands for is `[..., width]`. `plane`, where there is one,
    is the whole of which the codes are the first slots and places."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    quantisation: Quantisation
    plane: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.num_groups * self.quantisation.group_size)

    @property
    def num_groups(self) -> int:
        return self.scales.shape[-1]

    def dequantised(self) -> mx.array:
        """Returns the numbers that are stored, by MLX's own operation."""
        q = self.quantisation
        return mx.dequantize(
            self.codes, self.scales, self.biases, group_size=q.group_size, bits=q.bits
        )

    def by_plain_operations(self) -> mx.array:
        """Returns the same in a quarter of the time, on a CPU."""
        codes = self.codes_as(self.scales.dtype)
        groups = codes.reshape(*self.scales.shape, -1)
        return (groups * self.scales[..., None] + self.biases[..., None]).reshape(codes.shape)

    def codes_as(self, dtype: mx.Dtype) -> mx.array:
        """`[..., width]` of whole numbers from 0 on."""
        octets = self.codes.view(mx.uint8)
        if self.quantisation.bits == 4:
            halves = mx.stack([octets & 15, octets >> 4], axis=-1)
            octets = halves.reshape(*octets.shape[:-1], -1)
        return octets.astype(dtype)


def quantised(
    layers: Sequence[LayerShape], bits: int | None, group_size: int, default_bits: int = 16
) -> list[LayerShape]:
    """Returns the layers as they are to be stored, with bits 16, 8 or 4; None takes the device's
    `default_bits`.

    What was asked for and cannot be raises UnsupportedModelError; the device's choice takes groups
    of 32 where `group_size` does not divide a layer's heads, and leaves the layer as it is where
    those do not either.
    """
    if bits is None:
        chosen = Quantisation(default_bits, group_size)
        return [_as_far_as_possible(layer, chosen) for layer in layers]
    if bits == 16:
        return list(layers)
    if not layers:
        raise UnsupportedModelError(
            f"--kv-bits {bits}: the model keeps no K and V that the server could quantise"
        )
    asked = Quantisation(bits, group_size)
    for number, layer in enumerate(layers):
        if not _fits(layer, asked):
            raise UnsupportedModelError(
                f"--kv-bits {bits}: layer {number} keeps {layer.key_dim} numbers of K and "
                f"{layer.value_dim} of V a head, which --kv-group-size {group_size} does not divide"
            )
    return [replace(layer, quantisation=asked) for layer in layers]


def _as_far_as_possible(layer: LayerShape, wanted: Quantisation) -> LayerShape:
    for group_size in (wanted.group_size, SMALLEST_GROUP):
        candidate = replace(wanted, group_size=group_size)
        if wanted.bits < 16 and _fits(layer, candidate):
            return replace(layer, quantisation=candidate)
    return layer


def _fits(layer: LayerShape, wanted: Quantisation) -> bool:
    return wanted.divides(layer.key_dim) and wanted.divides(layer.value_dim)
