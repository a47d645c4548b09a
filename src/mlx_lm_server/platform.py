"""What machine and system this is. Nothing else asks the system that; what the device is that MLX
computes on, `runner/backends/choose.py` asks."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path


def is_linux() -> bool:
    return sys.platform == "linux"


def is_macos() -> bool:
    return sys.platform == "darwin"


def macos_version() -> tuple[int, ...]:
    """Returns the version of macOS, `(15, 3)`; nothing elsewhere."""
    parts = platform.mac_ver()[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def system_and_machine() -> str:
    """Returns both in the system's own words, such as `Linux x86_64`."""
    return f"{platform.system()} {machine()}"


def python() -> str:
    """Returns the version of Python."""
    return platform.python_version()


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


def cpu_name() -> str:
    """Returns the processor as it calls itself; on Linux with the kernel's family and model, since
    the name may say little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", text, re.MULTILINE))
    name, family, model = (fields.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"


def memory_bytes() -> int:
    """Returns how much memory the machine has, or 0 where the system does not say; how much of it
    an engine may take, the engine finds out."""
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def forget_pages(fd: int) -> None:
    """Asks the system to read this file from the disk the next time, as far as it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    elif (without_cache := getattr(fcntl, "F_NOCACHE", None)) is not None:  # macOS
        fcntl.fcntl(fd, without_cache, 1)


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
