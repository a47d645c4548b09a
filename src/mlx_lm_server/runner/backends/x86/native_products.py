"""The Python side of `native/products`: operations of our own that travel as products of matrices.

MLX offers no way to add an operation from Python. But `mx.addmm` hands two matrices and `alpha` to
cblas_sgemm, in whose place our library stands (blas.py), and a few values of `alpha` that no
product has say what else is meant (docs/adr/0005, 0008). An operand may then be a view that only
poses as a matrix; nothing but the library may read it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from mlx_lm_server import native

# As in native/products/door.c.
NIBBLES_ALPHA = 2.0**-104
BYTES_ALPHA = 2.0**-108
SWIGLU_ALPHA = 2.0**-112
ATTENTION_ALPHA = 2.0**-116
RMS_NORM_ALPHA = 2.0**-120
ROTATION_ALPHA = 2.0**-124
# MLX counts the numbers of a batch of matrices with 31 bits.
MAX_NUMBERS = 2**31 - 1

_ZERO = mx.array(0.0)
# In door.c, too; they are no numbers.
_NOTHING = mx.array([0x7FC16E6F, 0x7FC27468, 0x7FC3696E, 0x7FC46721] * 2, mx.uint32)


def run(left: mx.array, right: mx.array, alpha: float, added: mx.array = _ZERO) -> mx.array:
    """What the library makes of `[…, m, k]`, `[…, k, n]`, `alpha`, and of `added` `[…, m, n]`,
    which stands where the result will."""
    return mx.addmm(added, left, right, alpha=alpha, beta=1.0)


@functools.cache
def is_there() -> bool:
    """Whether our library stands in front of the BLAS: it answers NaN to what does not fit."""
    not_square = mx.ones((2, 1))
    return bool(mx.isnan(run(not_square.T, not_square, ROTATION_ALPHA)).item())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library itself, for what it does beside operations; None where it is not there."""
    return native.load("products") if is_there() else None


def copy_heads() -> Callable[..., None] | None:
    """Returns what copies.c does with its threads; None where the library is not there."""
    if (found := library()) is None:
        return None
    one, many = ctypes.c_long, ctypes.POINTER(ctypes.c_long)
    found.copy_heads.argtypes = one, many, many, one, many, many, many, one, one, one
    found.copy_heads.restype = None
    return cast(Callable[..., None], found.copy_heads)


def unwritten(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of numbers that are whatever stood there, for those who read only what they have
    written: nothing goes through memory, and the system need not find the pages yet. Zeros where
    it cannot be made."""
    width, is_odd = divmod(shape[-1] * dtype.size, 4)
    if dtype.size not in (2, 4) or is_odd or not is_there():
        return mx.zeros(shape, dtype)
    nothing = _NOTHING.view(mx.float32)
    left = mx.as_strided(nothing, (math.prod(shape[:-1]), 8), (8, 1))
    return (left @ mx.as_strided(nothing, (8, width), (width, 1))).view(dtype).reshape(shape)


def bits_of(x: float) -> int:
    """Those of x in float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return int(bits)
