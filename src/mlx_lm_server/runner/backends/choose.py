"""Which back end an engine gets: the one place that asks what the device is."""

from __future__ import annotations

import logging

import mlx.core as mx

from mlx_lm_server import platform
from mlx_lm_server.config import Way
from mlx_lm_server.runner import device_memory
from mlx_lm_server.runner.backend import Backend, Policy
from mlx_lm_server.runner.backends.fused import FusedBackend
from mlx_lm_server.runner.backends.x86.backend import X86Backend

log = logging.getLogger(__name__)

CPU_WAYS: tuple[Way, ...] = ("x86", "plain")

# A copy of a slab up to so much is made in a few milliseconds on a CPU.
MAX_RESIZED_BYTES = 64 * 1024 * 1024
# MLX's decode attention goes to cuDNN only over 256 keys or more, and where the whole slab has a
# multiple of 256 places.
CAPACITY_STEPS = {"metal": 32, "cuda": 256}


def choose(forced: Way | None = None) -> Backend:
    """Returns the back end of the default device; for tests that of another way, which any machine
    can go: without its device, so that nothing is known of how fast it is there."""
    own = _own_way()
    way = forced or own
    if way != own:
        log.warning("the device is treated as %s, which it is not (its own way: %s)", way, own)
    if way in CPU_WAYS and own not in CPU_WAYS:
        mx.set_default_device(mx.cpu)  # these ways write to arrays in the host's memory
    policy = policy_of(way, _device_name() if way == own else f"{way} (forced)")
    if way == "x86":
        return X86Backend(policy)
    return FusedBackend(policy, has_device=way == own)


def policy_of(way: Way, device: str) -> Policy:
    """Returns what is known of a way before anything is measured."""
    is_cpu = way in CPU_WAYS
    return Policy(
        way=way,
        device=device,
        is_in_host_memory=is_cpu,
        widens_weights=is_cpu,
        tight_kv_bits=16 if is_cpu else 8,
        submits_slowly=is_cpu,
        max_resized_bytes=MAX_RESIZED_BYTES if is_cpu else None,
        capacity_step=None if is_cpu else CAPACITY_STEPS[way],
        lookahead_share=1.0 if is_cpu else 1 / 8,
        length_step=32 if is_cpu else 1,
        max_copied_bytes=(32 if is_cpu else 128) << 20,
        pool_segments=512 if is_cpu else 128,
        token_tile=4 if is_cpu else 1,
        reduction_depth=64 if is_cpu else 1,
        has_threads=is_cpu,
    )


def _own_way() -> Way:
    if mx.default_device() == mx.Device(mx.cpu):
        return "x86" if platform.is_x86() else "plain"
    return "metal" if device_memory.has_metal() else "cuda"


def _device_name() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return str(device_memory.MlxMemory().info.get("device_name", "GPU"))
