"""Makes an interpreter on Linux miss what a Mac has not, before the package is imported.

Python imports this at its start where the folder is in PYTHONPATH: in the server and in its engine.

- `sys.platform` and its like say what a Mac's say, and what only Linux has of `os` is gone.
- Nothing but psutil, which asks a Mac's kernel, opens anything in /proc and /sys.
- Socket pairs hold 8 KiB and grant no more.
- 256 files may be open, 10240 where somebody asks, and who asks for more is refused.
- Our code is told of a GPU, in Metal's words.
- Each program that is started is noted in the file $MAC_PROGRAMS.

What is not here: Metal and Accelerate, so MLX computes as on any CPU; kqueue, and a kernel that
kills, swaps and sleeps as macOS does; the files of macOS and its compiler; what libraries in C do
there.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib.abc
import importlib.machinery
import io
import os
import platform
import resource
import socket
import sys
import sysconfig
import tempfile
import types
import urllib.request  # noqa: F401
from collections.abc import Callable, Sequence
from typing import Any

# What these look for where they believe to be on a Mac is not here, so they are told too late.
import psutil  # noqa: F401

sysconfig.get_config_vars()

OURS = "mlx_lm_server"
BUFFER_BYTES = 8192
FEW_FILES, MOST_FILES = 256, 10240
# As the kernel of macOS 15 tells of itself.
UNAME = os.uname_result(("Darwin", "mac.local", "24.6.0", "Darwin Kernel Version 24.6.0", "arm64"))
MAC_VERSION = ("15.6", ("", "", ""), "arm64")
# As the kernel tells its level of memory pressure.
PRESSURE_NAME, NORMAL_PRESSURE = b"kern.memorystatus_vm_pressure_level", 1
# What MLX's Metal back end fills in, with the numbers of a machine of 16 GB.
DEVICE = {
    "device_name": "Apple M2",
    "architecture": "applegpu_g14g",
    "memory_size": 17179869184,
    "max_recommended_working_set_size": 11453251584,
    "max_buffer_length": 8589934592,
    "resource_limit": 499000,
}
MISSING = {
    os: (
        *(name for name in dir(os) if name.lower().startswith(("sched_", "posix_fadv"))),
        *("O_DIRECT", "O_TMPFILE", "O_PATH", "fdatasync", "pipe2", "memfd_create", "eventfd"),
        *("posix_fallocate", "copy_file_range", "splice", "getrandom", "preadv2", "pidfd_open"),
        *("setresuid", "getresuid", "getxattr", "setxattr", "listxattr", "removexattr"),
    ),
    socket: ("SO_PEERCRED", "SO_PASSCRED", "TCP_USER_TIMEOUT", "AF_NETLINK", "SOCK_CLOEXEC"),
    resource: ("prlimit",),
}


def take_away_linux() -> None:
    for module, names in MISSING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined] # asked before it was taken away
    sys.platform = "darwin"
    os.uname = lambda: UNAME
    platform.mac_ver = lambda: MAC_VERSION
    plain_open, plain_os_open = io.open, os.open

    def opens(plain: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *more: Any, **named: Any) -> Any:
            if is_of_linux(path) and not is_called_by("psutil"):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            return plain(path, *more, **named)

        return opened

    builtins.open = io.open = opens(plain_open)
    os.open = opens(plain_os_open)


def is_of_linux(path: Any) -> bool:
    return not isinstance(path, int) and os.fsdecode(path).startswith(("/proc", "/sys"))


def is_called_by(package: str) -> bool:
    """Whether any of the callers is in the package."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


class NarrowSocket(socket.socket):
    """Refuses larger buffers, all or nothing."""

    def setsockopt(self, level: int, option: int, value: Any, *more: Any) -> None:
        is_buffer = level == socket.SOL_SOCKET and option in (socket.SO_SNDBUF, socket.SO_RCVBUF)
        if is_buffer and value > BUFFER_BYTES:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        super().setsockopt(level, option, value, *more)


def narrow_socket_pairs() -> None:
    plain = socket.socketpair

    def socketpair(*asked: Any) -> tuple[NarrowSocket, NarrowSocket]:
        ends = tuple(NarrowSocket(fileno=end.detach()) for end in plain(*asked))
        for end in ends:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        return ends

    socket.socketpair = socketpair


def limit_files() -> None:
    plain_get, plain_set = resource.getrlimit, resource.setrlimit
    _, hard = plain_get(resource.RLIMIT_NOFILE)
    plain_set(resource.RLIMIT_NOFILE, (FEW_FILES, hard))

    def getrlimit(which: int) -> tuple[int, int]:
        soft, most = plain_get(which)
        return (soft, resource.RLIM_INFINITY) if which == resource.RLIMIT_NOFILE else (soft, most)

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        if which == resource.RLIMIT_NOFILE:
            if limits[0] > MOST_FILES:
                raise ValueError("current limit exceeds maximum limit")
            limits = min(limits[0], hard), hard
        plain_set(which, limits)

    resource.getrlimit, resource.setrlimit = getrlimit, setrlimit


def answer_for_the_kernel() -> None:
    """The C library of macOS has `sysctlbyname`. Asked how short memory is, it says: it is not."""
    plain = ctypes.CDLL.__getattr__

    def found(library: ctypes.CDLL, name: str) -> Any:
        return sysctlbyname if name == "sysctlbyname" else plain(library, name)

    ctypes.CDLL.__getattr__ = found


def sysctlbyname(name: bytes, value: Any, size: Any, *new: Any) -> int:
    if name != PRESSURE_NAME:
        return -1
    value._obj.value = NORMAL_PRESSURE
    return 0


class DeviceFinder(importlib.abc.MetaPathFinder):
    """Finds `mlx.core` as everybody does, and changes what it tells us about the device."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "mlx.core":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        plain = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            plain(module)
            tell_of_metal(module)

        spec.loader.exec_module = exec_module
        return spec


def tell_of_metal(mx: Any) -> None:
    def for_us(owner: Any, name: str, answer: Any) -> None:
        plain = getattr(owner, name)

        def told(*given: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return answer if caller.partition(".")[0] == OURS else plain(*given)

        setattr(owner, name, told)

    for_us(mx, "default_device", mx.Device(mx.gpu))
    for_us(mx, "device_info", DEVICE)
    for_us(mx.metal, "is_available", True)


def note_programs(event: str, given: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        with os.fdopen(os.open(os.environ["MAC_PROGRAMS"], FLAGS, 0o600), "a") as programs:
            programs.write(f"{os.fsdecode(given[0])}\n")


FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT
take_away_linux()
narrow_socket_pairs()
limit_files()
answer_for_the_kernel()
sys.meta_path.insert(0, DeviceFinder())
sys.addaudithook(note_programs)
