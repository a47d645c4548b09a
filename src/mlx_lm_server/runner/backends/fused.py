"""MLX's own operations: Metal, CUDA, and CPUs that nothing of ours was written for."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_lm_server.runner.backend import (
    AttentionKernel,
    CopyHeads,
    MemoryPlan,
    ModelOperations,
    Policy,
    RowDraw,
    Unary,
    Upkeep,
)
from mlx_lm_server.runner.backends import gpu_memory
from mlx_lm_server.runner.backends.fused_kernel import FusedKernel
from mlx_lm_server.runner.backends.host_memory import HeapUpkeep
from mlx_lm_server.runner.device_memory import DeviceMemory, MlxMemory
from mlx_lm_server.runner.state.kv_quantisation import PackedKV
from mlx_lm_server.runner.state.kv_storage import Stored

CPU_MEMORY_SHARE = 0.75


class FusedBackend:
    """Chosen for Metal, CUDA and plain CPUs. `has_device` is False where the way of a GPU is tried
    without one."""

    def __init__(
        self, policy: Policy, *, has_device: bool = True, memory: DeviceMemory | None = None
    ) -> None:
        self._policy = policy
        self._has_device = has_device
        self._memory: DeviceMemory = memory or MlxMemory()

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
        """Returns a share of what the host has left, or what of the device's memory is for us."""
        host = self._memory.host
        if not self._has_gpu:
            return int(host.available_bytes * CPU_MEMORY_SHARE)
        return gpu_memory.limit_bytes(self._memory.info, host)

    def keep_to(self, plan: MemoryPlan) -> None:
        if self._has_gpu:
            gpu_memory.keep_to(plan, self._memory)

    def upkeep(self, memory_limit_bytes: int) -> Upkeep:
        if self._policy.is_in_host_memory:
            return HeapUpkeep(memory_limit_bytes, None)
        return gpu_memory.GpuUpkeep(self._memory)

    @property
    def _has_gpu(self) -> bool:
        return self._has_device and not self._policy.is_in_host_memory
