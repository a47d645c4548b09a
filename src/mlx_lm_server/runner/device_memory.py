"""What MLX and the system are asked and told about the memory of a device. Nothing else calls MLX
for that (`tests/unit/test_one_place.py`).

What MLX's allocators make of it, by their source (0.32.2: `mlx/backend/metal/allocator.cpp`,
`resident.cpp`, `mlx/backend/cuda/allocator.cpp`, `mlx/transforms.cpp`):

- The buffer of an array that goes is kept, for arrays of nearly its size: *active* bytes are in
  arrays, *cached* ones in such buffers, and the process has both. By default cached bytes are
  bounded by the memory limit only.
- Beyond the *cache limit* buffers go back to the system, at the next allocation at the latest.
- The *memory limit* refuses nothing. An allocation that would bring active and cached bytes over
  it gives cached buffers back first. As long as active bytes alone are over it, evaluation goes on
  only as operations that are under way end: it is slower, and takes no more than it must.
- Up to the *wired limit* Metal keeps buffers resident, cached ones too: the system can neither
  compress them nor write them to disk. It is 0 by default, has no effect before macOS 15, and is
  refused above the device's recommended working set. CUDA has none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import psutil

from mlx_lm_server import platform
from mlx_lm_server.protocol import MemoryPressure

# Numbers of Apple's kernel (XNU, bsd/kern/kern_memorystatus_notify.c); others count as normal.
PRESSURE_LEVELS: Mapping[int, MemoryPressure] = {1: "normal", 2: "warn", 4: "critical"}
PRESSURE_NAME = b"kern.memorystatus_vm_pressure_level"
FIRST_MACOS_THAT_WIRES = (15,)

DeviceInfo = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's memory: all of it, and what a process could have now without swapping."""

    total_bytes: int
    available_bytes: int


class DeviceMemory(Protocol):
    """The memory of MLX's default device. `MlxMemory` is the real one."""

    @property
    def info(self) -> DeviceInfo:
        """Returns what MLX tells of the device; the keys differ by kind of device."""

    @property
    def host(self) -> HostMemory: ...

    @property
    def active_bytes(self) -> int: ...

    @property
    def cached_bytes(self) -> int: ...

    def set_limits(self, *, memory_bytes: int, cache_bytes: int) -> None: ...

    def wire(self, num_bytes: int) -> str | None:
        """Keeps up to so many bytes resident. Returns why not, where it is refused. Nothing may be
        under way."""

    def clear_cache(self) -> None: ...

    def pressure(self) -> MemoryPressure:
        """Returns how short the system finds memory: "normal" where it does not say."""


class MlxMemory:
    """MLX's allocator and the system that this process runs on."""

    @property
    def info(self) -> DeviceInfo:
        return mx.device_info()

    @property
    def host(self) -> HostMemory:
        memory = psutil.virtual_memory()
        return HostMemory(memory.total, memory.available)

    @property
    def active_bytes(self) -> int:
        return mx.get_active_memory()

    @property
    def cached_bytes(self) -> int:
        return mx.get_cache_memory()

    def set_limits(self, *, memory_bytes: int, cache_bytes: int) -> None:
        mx.set_memory_limit(memory_bytes)
        mx.set_cache_limit(cache_bytes)

    def wire(self, num_bytes: int) -> str | None:
        if platform.macos_version() < FIRST_MACOS_THAT_WIRES:
            return "only macOS 15 and later can"
        try:
            mx.set_wired_limit(num_bytes)
        except (ValueError, RuntimeError) as refusal:
            return str(refusal)
        return None

    def clear_cache(self) -> None:
        mx.clear_cache()

    def pressure(self) -> MemoryPressure:
        if not platform.is_macos():
            return "normal"
        return read_pressure(ctypes.CDLL(None).sysctlbyname)


def read_pressure(sysctlbyname: Callable[..., int]) -> MemoryPressure:
    """Returns the level that macOS' kernel tells by this function of the C library."""
    level, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    nothing_new = (None, ctypes.c_size_t(0))
    status = sysctlbyname(PRESSURE_NAME, ctypes.byref(level), ctypes.byref(size), *nothing_new)
    return PRESSURE_LEVELS.get(level.value, "normal") if status == 0 else "normal"


def has_metal() -> bool:
    """Returns whether this MLX computes on Apple's GPUs."""
    return mx.metal.is_available()
