"""Which C compiler may be called, and what it could not compile before."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_lm_server import platform

NAMES = ("cc", "gcc", "clang")
# Where macOS has programs of these names that open a dialog, which offers to install the developer
# tools, unless those are there.
STUBS = Path("/usr/bin")
ASK_TIMEOUT_S = 10
# What a compiler may lack without being changed when it comes.
HEADERS = Path("/usr/include")
# For failures that had another cause, such as memory that was short.
FAILURE_COUNTS_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Compiler:
    """`identity` is another one when the compiler is, or what it compiles with."""

    path: str
    identity: str


def find(is_macos: bool | None = None, stubs: Path = STUBS) -> Compiler | None:
    """Returns the first that may be called without anybody being asked to install it."""
    return next(_usable(platform.is_macos() if is_macos is None else is_macos, stubs), None)


def _usable(is_macos: bool, stubs: Path) -> Iterator[Compiler]:
    for path in filter(None, map(shutil.which, NAMES)):
        needs_tools = is_macos and Path(path).parent == stubs
        tools = developer_folder() if needs_tools else None
        if tools is not None or not needs_tools:
            parts = (Path(path).resolve(), HEADERS, tools)
            yield Compiler(path, "\n".join(_identity(part) for part in parts if part is not None))


def developer_folder() -> Path | None:
    """Returns where macOS has its developer tools, or None, and opens no dialog for that."""
    asked = shutil.which("xcode-select")
    if asked is None:
        return None
    try:
        told = subprocess.run([asked, "-p"], capture_output=True, text=True, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    folder = told.stdout.strip()
    if told.returncode or not os.path.isabs(folder) or not os.path.isdir(folder):
        return None
    return Path(folder)


def _identity(path: Path) -> str:
    try:
        facts = path.stat()
    except OSError:
        return f"{path} -"
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


class Failure:
    """A file that says which compiler could not make the library beside it."""

    def __init__(self, library: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = library.with_suffix(".failed")
        self._clock = clock

    def is_known(self, compiler: Compiler) -> bool:
        """Returns whether the same compiler has failed lately."""
        try:
            age_s = self._clock() - self.path.stat().st_mtime
            return 0 <= age_s < FAILURE_COUNTS_S and self.path.read_text() == compiler.identity
        except OSError:
            return False

    def keep(self, compiler: Compiler) -> None:
        """Notes it, where that can be written down."""
        with suppress(OSError):
            self.path.write_text(compiler.identity)
            now_s = self._clock()
            os.utime(self.path, (now_s, now_s))

    def forget(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
