"""Devices that there are, as MLX describes them, and one whose memory is a fake.

The keys are those of MLX 0.32.2 (commit 846d176): `mlx/backend/metal/device_info.cpp` gives six for
Metal, `mlx/backend/cuda/device_info.cpp` eight for CUDA, of which `free_memory` and `total_memory`
are read anew at each call: from NVML, for all processes, or where that has no answer from
`cudaMemGetInfo`. Boards whose GPU has the host's memory get the same keys; nothing but the
architecture tells them apart, and NVML has no answer for them, or a wrong one. `gpu/device_info.h`,
which is installed with MLX 0.32.4, has the same list.

The numbers of M4 Pro and M5 Max are what MLX printed on such machines (the latter with 0.32.2), as
their owners wrote; those of an M3 are in AlexsJones/llmfit#754, those of a GB10 in
XuehaiPan/nvitop#208. The others are made up in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_lm_server.protocol import MemoryPressure
from mlx_lm_server.runner.device_memory import DeviceInfo, HostMemory

GIB, MIB = 1 << 30, 1 << 20


def mac(name: str, architecture: str, memory_bytes: int, working_set_bytes: int) -> DeviceInfo:
    return {
        "device_name": name,
        "architecture": architecture,
        "max_buffer_length": working_set_bytes * 3 // 4,
        "max_recommended_working_set_size": working_set_bytes,
        "memory_size": memory_bytes,
        "resource_limit": 499000,
    }


def nvidia(name: str, architecture: str, total_bytes: int, free_bytes: int) -> DeviceInfo:
    major, minor = divmod(int(architecture.removeprefix("sm_")), 10)
    return {
        "device_name": name,
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
        "architecture": architecture,
        "pci_bus_id": "0000:01:00.0",
        "compute_capability_major": major,
        "compute_capability_minor": minor,
        "free_memory": free_bytes,
        "total_memory": total_bytes,
    }


M1_8 = mac("Apple M1", "applegpu_g13g", 8 * GIB, 5461 * MIB)
M3_16 = mac("Apple M3", "applegpu_g15g", 16 * GIB, 12124 * MIB)
M4_PRO_48 = mac("Apple M4 Pro", "applegpu_g16s", 51539607552, 40200896512)
M5_MAX_64_RAISED = mac("Apple M5 Max", "applegpu_g17s", 68719476736, 60129542144)
M5_MAX_128 = mac("Apple M5 Max", "applegpu_g17s", 137438953472, 115448725504)
RTX_4090 = nvidia("NVIDIA GeForce RTX 4090", "sm_89", 24564 * MIB, 24100 * MIB)
RTX_4090_SHARED = nvidia("NVIDIA GeForce RTX 4090", "sm_89", 24564 * MIB, 10 * GIB)
H100 = nvidia("NVIDIA H100 80GB HBM3", "sm_90", 81559 * MIB, 81000 * MIB)
# `cudaMemGetInfo` of a machine whose page cache has most of what is free.
GB10 = nvidia("NVIDIA GB10", "sm_121", 127600748 * 1024, 7976902656)
# NVML of a laptop's chip of this kind knows a part that was set aside.
GB10_CARVED_OUT = nvidia("NVIDIA N1X", "sm_121", 8128 * MIB, 7929 * MIB)
ORIN = nvidia("Orin", "sm_87", 30 * GIB, 3 * GIB)
ORIN_NANO = nvidia("Orin", "sm_87", 8 * GIB, 2 * GIB)


@dataclass
class FakeMemory:
    """A device with its limits, what it was told in order, and a machine that may be short of
    memory."""

    info: DeviceInfo = field(default_factory=lambda: M4_PRO_48)
    host: HostMemory = field(default_factory=lambda: HostMemory(48 * GIB, 40 * GIB))
    active_bytes: int = 0
    cached_bytes: int = 0
    level: MemoryPressure = "normal"
    refusal: str | None = None
    memory_limit_bytes: int | None = None
    cache_limit_bytes: int | None = None
    wired_limit_bytes: int = 0
    num_cleared: int = 0
    num_asked: int = 0

    def set_limits(self, *, memory_bytes: int, cache_bytes: int) -> None:
        self.memory_limit_bytes, self.cache_limit_bytes = memory_bytes, cache_bytes

    def wire(self, num_bytes: int) -> str | None:
        if self.refusal is None:
            self.wired_limit_bytes = num_bytes
        return self.refusal

    def clear_cache(self) -> None:
        self.cached_bytes = 0
        self.num_cleared += 1

    def pressure(self) -> MemoryPressure:
        self.num_asked += 1
        return self.level
