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

_WORDS = native.numbers_in("products/words.h")
(NIBBLES_ALPHA,) = _WORDS["NIBBLES_ALPHA"]
(BYTES_ALPHA,) = _WORDS["BYTES_ALPHA"]
(SWIGLU_ALPHA,) = _WORDS["SWIGLU_ALPHA"]
(ATTENTION_ALPHA,) = _WORDS["ATTENTION_ALPHA"]
(RMS_NORM_ALPHA,) = _WORDS["RMS_NORM_ALPHA"]
(ROTATION_ALPHA,) = _WORDS["ROTATION_ALPHA"]
EPSILON_SHIFT, POSING_DEPTH = (int(*_WORDS[name]) for name in ("EPSILON_SHIFT", "POSING_DEPTH"))
# MLX counts the numbers of a batch of matrices with 31 bits.
MAX_NUMBERS = 2**31 - 1

_ZERO = mx.array(0.0)
_NOTHING = mx.array([int(word) for word in _WORDS["NOTHING"]] * 2, mx.uint32)


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


def copy_heads() -> Callable[..., int] | None:
    """Returns what copies.c does with its threads, which gives 0 where it refuses; None where the
    library is not there."""
    if (found := library()) is None:
        return None
    one, many = ctypes.c_long, ctypes.POINTER(ctypes.c_long)
    found.copy_heads.argtypes = one, many, many, one, many, many, many, one, one, one
    return cast(Callable[..., int], found.copy_heads)


def unwritten(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of numbers that are whatever stood there, for those who read only what they have
    written: nothing goes through memory, and the system need not find the pages yet. Zeros where
    it cannot be made."""
    width, is_odd = divmod(shape[-1] * dtype.size, 4)
    if dtype.size not in (2, 4) or is_odd or not is_there():
        return mx.zeros(shape, dtype)
    nothing = _NOTHING.view(mx.float32)
    left = posing(nothing, math.prod(shape[:-1]), POSING_DEPTH)
    return (left @ posing(nothing, POSING_DEPTH, width)).view(dtype).reshape(shape)


def posing(array: mx.array, rows: int, columns: int) -> mx.array:
    """Returns a view of the array that poses as a matrix of such a size."""
    return mx.as_strided(array, (rows, columns), (columns, 1))


def bits_of(x: float) -> int:
    """Those of x in float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return int(bits)
