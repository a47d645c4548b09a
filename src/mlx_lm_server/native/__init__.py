"""C code, compiled for this CPU at the first start and kept in the user's cache folder.

This module must not import mlx: the BLAS is loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlx_lm_server import folders, platform
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.native import compiler
from mlx_lm_server.native.compiler import Compiler, Failure

log = logging.getLogger(__name__)

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
    """Loads the library made of the folder `name` beside this file; gives None where it cannot be
    compiled here."""
    target = compiled(name)
    if target is None:
        return None
    try:
        return ctypes.CDLL(str(target), mode)
    except OSError:
        return None


def compiled(name: str) -> Path | None:
    """Returns where the library of that folder, beside this file or elsewhere, is kept, and
    compiles it where it is not yet; None where that cannot be done here, or could not lately."""
    folder = Path(__file__).parent / name
    machine = " ".join([platform.machine(), *sorted(platform.cpu_flags()), *OPTIONS])
    code = b"".join(file.read_bytes() for file in sorted(folder.glob("*.[ch]")))
    identity = hashlib.sha256(code + machine.encode()).hexdigest()[:16]
    cache = cache_folder()
    if cache is None:
        return None
    target = cache / f"{folder.name}-{identity}.so"
    if target.exists() or _compile(sorted(folder.glob("*.c")), target):
        return target
    return None


def numbers_in(header: str) -> dict[str, tuple[float, ...]]:
    """Returns the numbers that a header beside this file defines, by name: what C code and its
    callers have in common is written down there and nowhere else."""
    code = (Path(__file__).parent / header).read_text()
    defined = re.findall(r"^#define (\w+) (.*?)(?: *//.*| */\*.*)?$", code, re.MULTILINE)
    return {name: tuple(map(_number, re.findall(r"[\w.+-]+", text))) for name, text in defined}


def _number(text: str) -> float:
    return float.fromhex(text.removesuffix("f")) if "p" in text else int(text, 0)


def text_in(library: ctypes.CDLL, name: str) -> str | None:
    """Returns the text that a library exports by that name; None where there is none."""
    try:
        text = ctypes.c_char_p.in_dll(library, name).value
    except ValueError:
        return None
    return None if text is None else text.decode()


def cache_folder() -> Path | None:
    """None where there is none whose code can be trusted."""
    try:
        return folders.cache_folder() / "native"
    except ConfigError:
        return None


def _compile(sources: Sequence[Path], target: Path) -> bool:
    """Tries it once: what failed is tried again where the compiler is another, or after a day."""
    chosen, failure = compiler.find(), Failure(target)
    if chosen is None or failure.is_known(chosen):
        return False
    try:
        _build(chosen, sources, target)
    except subprocess.SubprocessError as error:
        failure.keep(chosen)
        why = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        told = why.partition("\n")[0] or str(error)
        log.warning("%s cannot compile %s (%s)", chosen.path, sources[0].parent.name, told)
        return False
    except OSError:
        return False
    failure.forget()
    return True


def _build(chosen: Compiler, sources: Sequence[Path], target: Path) -> None:
    """Atomic, so that two engines that start at once do not see half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        subprocess.run(
            [chosen.path, *OPTIONS, *LINK_OPTIONS, "-o", str(built), *map(str, sources)],
            check=True,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        built.replace(target)
