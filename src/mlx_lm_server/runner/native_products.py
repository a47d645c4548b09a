"""The Python side of `native/products`: operations of our own that travel as products of matrices.

MLX offers no way to add an operation from Python. But `mx.addmm` hands two matrices and `alpha` to
cblas_sgemm, in whose place our library stands (blas.py), and a few values of `alpha` that no
product has say what else is meant (docs/adr/0005, 0008). An operand may then be a view that only
poses as a matrix; nothing but the library may read it.
"""

from __future__ import annotations

import struct

import mlx.core as mx

# As in native/products/door.c.
NIBBLES_ALPHA = 2.0**-104
BYTES_ALPHA = 2.0**-108
ADDRESS_ALPHA = 2.0**-112
ATTENTION_ALPHA = 2.0**-116
RMS_NORM_ALPHA = 2.0**-120
ROTATION_ALPHA = 2.0**-124
# MLX counts the numbers of a batch of matrices with 31 bits.
MAX_NUMBERS = 2**31 - 1

_ZERO = mx.array(0.0)


def run(left: mx.array, right: mx.array, alpha: float) -> mx.array:
    """What the library makes of `[…, m, k]`, `[…, k, n]` and `alpha`: `[…, m, n]`."""
    return mx.addmm(_ZERO, left, right, alpha=alpha, beta=0.0)


def is_there() -> bool:
    """Whether our library stands in front of the BLAS: the address of a matrix is not the zeros
    that the product would be."""
    return bool(mx.any(addresses_of(mx.ones((1, 1, 8))).view(mx.int32) != 0))


def addresses_of(heads: mx.array) -> mx.array:
    """Where each of `[n, rows, dim]` begins: `[n, 2]`, 8 bytes that pose as floats.

    Rows must lie one after the other, or it is the address of a copy that is gone when it is read;
    and an address keeps nothing alive.
    """
    num, _, dim = heads.shape
    nothing = mx.broadcast_to(_ZERO, (num, dim, 2))
    return run(heads[:, :1], nothing, ADDRESS_ALPHA).reshape(num, 2)


def posing_as_floats(numbers: tuple[int, ...]) -> mx.array:
    return mx.array(numbers, mx.int32).view(mx.float32)


def bits_of(x: float) -> int:
    """Those of x in float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return int(bits)
