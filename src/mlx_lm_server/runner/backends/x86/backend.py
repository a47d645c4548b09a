"""Our own arithmetic and C code, where they can be had, in place of MLX's CPU back end."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_lm_server.runner.backend import (
    AttentionKernel,
    CopyHeads,
    ModelOperations,
    RowDraw,
    Unary,
    Upkeep,
)
from mlx_lm_server.runner.backends.fused import FusedBackend
from mlx_lm_server.runner.backends.host_memory import HeapUpkeep
from mlx_lm_server.runner.backends.x86 import (
    fast_math,
    native_draw,
    native_products,
    native_rows,
)
from mlx_lm_server.runner.backends.x86.kernel import CpuKernel


class X86Backend(FusedBackend):
    """Chosen for x86 CPUs. Models in other types than float32 attend as on other CPUs."""

    @property
    def exp(self) -> Unary:
        return fast_math.arithmetic_exp

    @property
    def log(self) -> Unary:
        return fast_math.arithmetic_log

    @property
    def draw(self) -> RowDraw | None:
        return native_draw.load()

    @property
    def copy_heads(self) -> CopyHeads | None:
        return native_products.copy_heads()

    def operations(self, plain_swiglu: Callable[..., mx.array]) -> ModelOperations:
        def swiglu(gate: mx.array, x: mx.array) -> mx.array:
            is_float32 = gate.dtype == mx.float32
            return fast_math.swiglu(gate, x) if is_float32 else plain_swiglu(gate, x)

        return native_rows.operations(swiglu)

    def kernel(self, dtype: mx.Dtype) -> AttentionKernel:
        return CpuKernel() if dtype == mx.float32 else super().kernel(dtype)

    def unwritten(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return native_products.unwritten(shape, dtype)

    def upkeep(self, memory_limit_bytes: int) -> Upkeep:
        library = native_products.library()
        grow_ahead = None if library is None else library.grow_heap_ahead
        return HeapUpkeep(memory_limit_bytes, grow_ahead)
