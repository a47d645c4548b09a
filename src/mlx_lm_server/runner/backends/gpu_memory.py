"""How much of a GPU's memory an engine takes, what MLX is told of it, and what is done about it
between steps.

On a Mac, and on NVIDIA's boards without memory of their own, the GPU has the host's memory, and
other programs need some of that: the engine plans without a reserve for them, wires nothing of it,
and gives up cached prefixes when the system says that memory is short.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from mlx_lm_server.core.memory_ledger import format_bytes
from mlx_lm_server.protocol import MemoryPressure
from mlx_lm_server.runner.backend import MemoryPlan
from mlx_lm_server.runner.device_memory import DeviceInfo, DeviceMemory, HostMemory

log = logging.getLogger(__name__)

GIB = 1 << 30
# Of what a device has, or a Mac's system recommends for it.
DEVICE_SHARE = 0.9
# Of what the host has left, where nothing is told of the device.
HOST_SHARE = 0.75
# Of the host's memory, what is left to other programs: so much, or such a share where that is more.
OTHERS_BYTES, OTHERS_SHARE = 4 * GIB, 0.08
# Of what is free on a device, what MLX's allocator does not count: CUDA's context, modules, graphs.
UNCOUNTED_BYTES, UNCOUNTED_SHARE = GIB // 2, 0.05
# NVIDIA's chips that have the host's memory: Xavier, Orin, Thor (two names), GB10. What is told of
# them as device memory misses the host's page cache, or knows a part that was set aside only.
SHARING_ARCHITECTURES = ("sm_72", "sm_87", "sm_101", "sm_110", "sm_121")
MIN_CACHE_BYTES = GIB // 4

IDLE_BEFORE_CLEAR_S = 60.0
SECONDS_BETWEEN_LOOKS = 1.0
# What the prefix cache keeps at each cut, and of all cuts; how often it is cut while memory stays
# short, and how long memory is not short before it may grow again.
KEPT_AT_WARNING, LEAST_AT_WARNING = 0.75, 0.25
SECONDS_BETWEEN_CUTS = 10.0
CALM_S = 30.0


def limit_bytes(info: DeviceInfo, host: HostMemory) -> int:
    """Returns how much an engine may take where nobody said it. `info` is what MLX tells of the
    device: Metal gives `max_recommended_working_set_size` and `memory_size`, CUDA `total_memory`
    and `free_memory`."""
    working_set, mac_bytes = _number(info, "max_recommended_working_set_size", "memory_size")
    if working_set and mac_bytes:
        return min(int(DEVICE_SHARE * working_set), _beside_others(mac_bytes))
    total, free = _number(info, "total_memory", "free_memory")
    if _shares_host_memory(info):
        total, free = host.total_bytes, host.available_bytes
        return min(int(DEVICE_SHARE * total), _beside_others(total), _countable(free))
    if total:  # a card that is full has nothing for us, whatever the host has
        return min(int(DEVICE_SHARE * total), _countable(free))
    log.warning("MLX does not tell how much memory the device has: the host's is taken for it")
    return int(HOST_SHARE * host.available_bytes)


def keep_to(plan: MemoryPlan, memory: DeviceMemory) -> None:
    """Sets MLX's limits. The memory limit is the plan's, so that active and cached bytes together
    stay below what was promised. Only steps with arrays too large for the plan, which take long
    anyway, are slowed down by it. The cache limit is what a step gives back, for the next one to
    find: larger buffers are slabs and segments that were dropped, and others can use those."""
    cache_bytes = min(plan.limit_bytes, max(MIN_CACHE_BYTES, plan.step_bytes))
    memory.set_limits(memory_bytes=plan.limit_bytes, cache_bytes=cache_bytes)
    num_bytes = wired_bytes(plan, memory.info)
    if num_bytes == 0:
        return
    why_not = memory.wire(num_bytes)
    if why_not is None:
        log.info("%s are kept resident", format_bytes(num_bytes))
    else:
        log.warning(
            "the system may compress or swap the model when memory is short: %s cannot be kept "
            "resident (%s)",
            format_bytes(num_bytes),
            why_not,
        )


def wired_bytes(plan: MemoryPlan, info: DeviceInfo) -> int:
    """Returns how much the system is asked to keep resident: weights, K and V and what a step
    takes, but no more than the device is recommended to use, nor what others need; 0 where nothing
    can be wired."""
    working_set, mac_bytes = _number(info, "max_recommended_working_set_size", "memory_size")
    if not (working_set and mac_bytes):
        return 0
    return min(plan.held_bytes + plan.step_bytes, working_set, _beside_others(mac_bytes))


def _number(info: DeviceInfo, *names: str) -> list[int]:
    """Returns what is told by these names, 0 where nothing is."""
    return [int(info.get(name, 0)) for name in names]


def _shares_host_memory(info: DeviceInfo) -> bool:
    return info.get("architecture") in SHARING_ARCHITECTURES


def _beside_others(num_bytes: int) -> int:
    """Returns what of the host's memory is not left to other programs."""
    return max(0, num_bytes - max(OTHERS_BYTES, int(OTHERS_SHARE * num_bytes)))


def _countable(free_bytes: int) -> int:
    """Returns what of free device memory can be in arrays."""
    return max(0, free_bytes - max(UNCOUNTED_BYTES, int(UNCOUNTED_SHARE * free_bytes)))


class GpuUpkeep:
    """Gives MLX's cached buffers back after a while without work, and when the system says that
    memory is short; then the prefix cache has to shrink too. Used on the engine's main thread,
    where it asks the system no more than once a second.

    A warning costs the prefix cache a quarter, and another one every ten seconds that it lasts, up
    to a last quarter; a critical state all of it. It may grow again when memory has not been short
    for half a minute.
    """

    def __init__(self, memory: DeviceMemory, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._pressure: MemoryPressure = "normal"
        self._cache_share = 1.0
        self._looked_s = self._cut_s = self._short_s = -math.inf
        self._has_cut = False
        self._idle_since_s: float | None = None

    @property
    def pressure(self) -> MemoryPressure:
        return self._pressure

    @property
    def cache_share(self) -> float:
        return self._cache_share

    def after_step(self, *, took_memory: bool) -> None:
        self._idle_since_s = None
        self._look(self._clock())

    def rest(self) -> None:
        """There is nothing to do: after a while gives back what is cached, once."""
        now_s = self._clock()
        self._look(now_s)
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s > IDLE_BEFORE_CLEAR_S:
            self._memory.clear_cache()
            self._idle_since_s = math.inf

    def _look(self, now_s: float) -> None:
        if now_s - self._looked_s < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_s = now_s
        if self._has_cut:  # what the prefix cache has dropped since lies in MLX's cache
            self._memory.clear_cache()
            self._has_cut = False
        self._pressure = self._memory.pressure()
        if self._pressure == "normal":
            if now_s - self._short_s >= CALM_S:
                self._cache_share = 1.0
            return
        self._short_s = now_s
        if self._pressure == "critical":
            self._memory.clear_cache()
            self._cut(0.0, now_s)
        elif now_s - self._cut_s >= SECONDS_BETWEEN_CUTS:
            share = max(LEAST_AT_WARNING, KEPT_AT_WARNING * self._cache_share)
            self._cut(min(share, self._cache_share), now_s)

    def _cut(self, share: float, now_s: float) -> None:
        if share != self._cache_share:
            log.warning(
                "the machine's memory is short (%s): the prefix cache keeps %.0f %% of what it had",
                self._pressure,
                100 * share,
            )
        self._cache_share, self._cut_s, self._has_cut = share, now_s, True
