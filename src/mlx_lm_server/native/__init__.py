"""C code, compiled for this CPU at the first start and kept in the user's cache folder.

This module must not import mlx: the BLAS is loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlx_lm_server import folders, platform
from mlx_lm_server.errors import ConfigError

COMPILE_TIMEOUT_S = 60
# Without some of them the compiler keeps branches that stand for errors nobody looks at; and two
# ways to one result agree in each bit only if it does not join products and sums as it likes.
OPTIONS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
LINK_OPTIONS = ("-fPIC", "-shared", "-pthread")


def load(name: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL | None:
    """The library made of the folder `name` beside this file; None where it cannot be compiled
    here."""
    folder = Path(__file__).parent / name
    machine = " ".join([platform.machine(), *sorted(platform.cpu_flags()), *OPTIONS])
    code = b"".join(file.read_bytes() for file in sorted(folder.glob("*.[ch]")))
    identity = hashlib.sha256(code + machine.encode()).hexdigest()[:16]
    cache = cache_folder()
    if cache is None:
        return None
    target = cache / f"{name}-{identity}.so"
    if not target.exists() and not _compile(sorted(folder.glob("*.c")), target):
        return None
    try:
        return ctypes.CDLL(str(target), mode)
    except OSError:
        return None


def cache_folder() -> Path | None:
    """None where there is none whose code can be trusted."""
    try:
        return folders.cache_folder() / "native"
    except ConfigError:
        return None


def _compile(sources: Sequence[Path], target: Path) -> bool:
    """Atomic, so that two engines that start at once do not see half a file."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            subprocess.run(
                [compiler, *OPTIONS, *LINK_OPTIONS, "-o", str(built), *map(str, sources)],
                check=True,
                capture_output=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            built.replace(target)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
