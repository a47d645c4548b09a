"""What machine and system this is. Nothing else asks the system that; what the device is that MLX
computes on, `runner/backends/choose.py` asks."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def is_linux() -> bool:
    return sys.platform == "linux"


def is_macos() -> bool:
    return sys.platform == "darwin"


def macos_version() -> tuple[int, ...]:
    """Returns the version of macOS, `(15, 3)`; nothing elsewhere."""
    parts = platform.mac_ver()[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def machine() -> str:
    """Returns the kind of processor, in the system's words."""
    return platform.machine()


def is_x86() -> bool:
    return machine() in ("x86_64", "AMD64")


def cpu_flags() -> set[str]:
    """Returns what the processor can do, in the words of Linux; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def usable_cores() -> int:
    """Returns how many cores this process may use: its affinity mask, and the CPU quota of its
    control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _cgroup_cores()))


def _cgroup_cores() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return sys.maxsize
