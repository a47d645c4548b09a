"""Calls of the C code with arrays that end where the call says they do, so that a sanitizer sees
each step beyond them."""

from __future__ import annotations

import ctypes
import functools
import shutil
import sys
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from mlx_lm_server import native, platform
from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.backends.x86.span_attention import Facts
from mlx_lm_server.runner.state.step_layout import Span

needs_library = pytest.mark.skipif(
    sys.platform != "linux"
    or not shutil.which("cc")
    or not {"avx2", "fma"} <= platform.cpu_flags(),
    reason="needs a C compiler and a CPU with AVX2",
)

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]
ROW_MAJOR, COLUMN_MAJOR, NO_TRANS, TRANS = 101, 102, 111, 112
INT_MAX = 2**31 - 1
UNTOUCHED = 7.5


@functools.cache
def products() -> ctypes.CDLL:
    """Returns the library that conftest.py has put in front of the BLAS."""
    library = native.load("products")
    assert library is not None
    whole, real, memory = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    library.cblas_sgemm.argtypes = (*[whole] * 6, real, *[memory, whole] * 2, real, memory, whole)
    library.cblas_sgemm.restype = None
    return library


@dataclass(frozen=True)
class Call:
    """cblas_sgemm with C's place described by `c` and `ldc`."""

    m: int
    n: int
    k: int
    a: Array | None
    lda: int
    b: Array | None
    ldb: int
    c: Floats | None
    ldc: int
    alpha: float = 1.0
    beta: float = 0.0
    trans_a: int = NO_TRANS
    trans_b: int = NO_TRANS
    order: int = ROW_MAJOR

    def run(self) -> None:
        a, b, c = (None if x is None else x.ctypes.data for x in (self.a, self.b, self.c))
        sizes = self.order, self.trans_a, self.trans_b, self.m, self.n, self.k
        operands = self.alpha, a, self.lda, b, self.ldb, self.beta, c, self.ldc
        products().cblas_sgemm(*sizes, *operands)

    def answer(self) -> Floats:
        """Returns C after the call, which must touch nothing between its rows."""
        self.run()
        assert self.c is not None
        rows, between = rows_of(self.c, self.m, self.n, self.ldc)
        assert (between == UNTOUCHED).all()
        return rows


def lying(rows: Array, stride: int) -> Array:
    """Returns an array in which rows lie so far apart, and that ends with the last of them."""
    num, width = rows.shape
    flat = np.full((num - 1) * stride + width, UNTOUCHED, rows.dtype)
    for number, row in enumerate(rows):
        flat[number * stride : number * stride + width] = row
    return flat


def rows_of(flat: Floats, num: int, width: int, stride: int) -> tuple[Floats, Floats]:
    """Returns what lies so, and what lies between."""
    starts = [number * stride for number in range(num)]
    rows = np.stack([flat[start : start + width] for start in starts])
    gaps = [flat[start + width : start + stride] for start in starts[:-1]]
    return rows, np.concatenate([*gaps, np.empty(0, np.float32)])


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Attention:
    """What attention is asked; `told` and `spans` may be made to lie."""

    facts: Facts
    spans: tuple[Span, ...]
    queries: Floats  # [tokens, heads, width]
    keys: Floats  # [slots, kv_heads, capacity, key_dim]
    values: Floats
    sinks: Floats | None = None
    new: Floats | None = None  # [2 * tokens * kv_heads, width]

    @classmethod
    def of(
        cls,
        spans: tuple[Span, ...],
        *,
        num_slots: int = 3,
        kv_heads: int = 2,
        share: int = 2,
        capacity: int = 70,
        dims: tuple[int, int] = (16, 16),
        window: int = 0,
        has_sinks: bool = False,
        has_new: bool = False,
    ) -> Attention:
        width, heads = max(dims), kv_heads * share
        num_tokens = max(span.first_token + span.num_tokens for span in spans)
        first_row = -(-(len(Facts._fields) + 4 * len(spans)) // width)
        sinks_at = first_row * width if has_sinks else 0
        first_row += -(-heads // width) if has_sinks else 0
        facts = Facts(
            num_spans=len(spans),
            num_slots=num_slots,
            kv_heads=kv_heads,
            capacity=capacity,
            key_dim=dims[0],
            value_dim=dims[1],
            share=share,
            window=window,
            sinks_at=sinks_at,
            first_row=first_row,
            num_tokens=num_tokens,
            has_new=int(has_new),
            scale=native_products.bits_of(dims[0] ** -0.5),
        )
        return cls(
            facts,
            spans,
            normal(num_tokens, heads, width),
            normal(num_slots, kv_heads, capacity, dims[0], seed=1),
            normal(num_slots, kv_heads, capacity, dims[1], seed=2),
            normal(heads) if has_sinks else None,
            normal(2 * num_tokens * kv_heads, width, seed=3) if has_new else None,
        )

    def call(self) -> Call:
        """Returns it as a product; its C begins with what is told."""
        width = self.queries.shape[-1]
        numbers = np.array([*self.facts, *(n for span in self.spans for n in span)], np.int64)
        before = _padded(numbers.astype(np.int32).view(np.float32), width)
        if self.sinks is not None:
            before = np.concatenate([before, _padded(self.sinks, width)])
        rows = self.queries.reshape(-1, width)
        c = np.concatenate([before, rows, *([] if self.new is None else [self.new])])
        depth, alpha = native_products.POSING_DEPTH, native_products.ATTENTION_ALPHA
        k, v = (self.keys, depth), (self.values, width)
        return Call(len(c), width, depth, *k, *v, c.reshape(-1), width, alpha, beta=1.0)

    def lying(self, **facts: int) -> Attention:
        """Returns it with other facts than those that are true."""
        return replace(self, facts=self.facts._replace(**facts))

    def answer(self) -> Floats:
        """Returns what the tokens saw, `[tokens, heads, value_dim]`."""
        rows = self.call().answer()[self.facts.first_row :][: self.queries[..., 0].size]
        return rows.reshape(self.queries.shape)[..., : self.facts.value_dim]


def _padded(numbers: Floats, width: int) -> Floats:
    return np.pad(numbers, (0, -len(numbers) % width)).reshape(-1, width)
