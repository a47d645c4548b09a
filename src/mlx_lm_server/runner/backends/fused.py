"""MLX's own operations: Metal, CUDA, and CPUs that nothing of ours was written for."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import psutil

from mlx_lm_server.runner.backend import (
    AttentionKernel,
    CopyHeads,
    ModelOperations,
    Policy,
    RowDraw,
    Unary,
    Upkeep,
)
from mlx_lm_server.runner.backends.fused_kernel import FusedKernel
from mlx_lm_server.runner.backends.host_memory import HeapUpkeep
from mlx_lm_server.runner.state.kv_quantisation import PackedKV
from mlx_lm_server.runner.state.kv_storage import Stored

CPU_MEMORY_SHARE = 0.75
GPU_MEMORY_SHARE = 0.9


class FusedBackend:
    """Chosen for Metal, CUDA and plain CPUs. `has_device` is False where the way of a GPU is tried
    without one."""

    def __init__(self, policy: Policy, *, has_device: bool = True) -> None:
        self._policy = policy
        self._has_device = has_device

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def exp(self) -> Unary:
        return mx.exp

    @property
    def log(self) -> Unary:
        return mx.log

    @property
    def draw(self) -> RowDraw | None:
        return None

    @property
    def copy_heads(self) -> CopyHeads | None:
        return None

    def operations(self, plain_swiglu: Callable[..., mx.array]) -> ModelOperations:
        return ModelOperations()

    def kernel(self, dtype: mx.Dtype) -> AttentionKernel:
        return FusedKernel(self._numbers, multiplies_codes=self._policy.way == "metal")

    def _numbers(self, stored: Stored) -> mx.array:
        return self.read(stored) if isinstance(stored, PackedKV) else stored

    def unwritten(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return mx.zeros(shape, dtype)

    def read(self, packed: PackedKV) -> mx.array:
        if self._policy.is_in_host_memory:
            return packed.by_plain_operations()
        return packed.dequantised()

    def memory_limit_bytes(self) -> int:
        """Returns a share of what the device recommends, or of what the host has left."""
        if self._policy.is_in_host_memory or not self._has_device:
            return int(psutil.virtual_memory().available * CPU_MEMORY_SHARE)
        info = mx.device_info()
        recommended = info.get("max_recommended_working_set_size") or info.get("memory_size")
        return int(int(recommended or psutil.virtual_memory().total) * GPU_MEMORY_SHARE)

    def upkeep(self, memory_limit_bytes: int) -> Upkeep | None:
        return HeapUpkeep(memory_limit_bytes, None) if self._policy.is_in_host_memory else None
