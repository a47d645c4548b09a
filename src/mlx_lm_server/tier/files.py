"""What the disk tier asks of the file system when it keeps records: every such call is in `Files`.

Tests implement `Files` with faults; they enumerate its methods and fail on one without a fault
case. All methods raise OSError, but `read_files`, which yields it. sqlite reads and writes its own
file, and `model_digest` the model's.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from mlx_lm_server.tier.native_files import files_library, write_pieces
from mlx_lm_server.tier.reading import Contents, FilesReader

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
NO_SUCH_FLAG = (errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """`inode` tells a file from another that took its place."""

    size: int
    modified_s: float
    inode: int


class Files(Protocol):
    def create(self, path: Path) -> int:
        """Opens a new file for writing; FileExistsError where there is one."""

    def open(self, path: Path) -> int:
        """Opens a file for reading."""

    def write(self, fd: int, pieces: Sequence[memoryview]) -> int:
        """Writes some of the pieces' bytes, in order, and returns how many."""

    def read(self, fd: int, max_bytes: int) -> bytes:
        """Returns some of the next bytes; none at the end."""

    def read_files(self, paths: Sequence[Path], max_bytes: Sequence[int]) -> Generator[Contents]:
        """Yields the first so many bytes of each file or why it cannot be read, in order; several
        are being read at once."""

    def fsync(self, fd: int) -> None:
        """Returns when the file's bytes are on the medium."""

    def close(self, fd: int) -> None: ...

    def rename(self, source: Path, target: Path) -> None:
        """Puts a file in the place of another, if there is one, in one step."""

    def unlink(self, path: Path) -> None: ...

    def make_folder(self, path: Path) -> None:
        """Makes it and what is above it, where that is missing."""

    def sync_folder(self, path: Path) -> None:
        """Returns when the folder's entries are on the medium."""

    def list_folder(self, path: Path) -> list[str]: ...

    def facts(self, path: Path) -> FileFacts: ...

    def free_bytes(self, path: Path) -> int:
        """Returns what a user's files may still take on the path's file system."""


class OsFiles:
    """Asks the operating system. What is written or read does not stay in its cache, where the
    system lets us say so: memory has it, or had it and let it go."""

    def __init__(self) -> None:
        self._library = files_library()
        self._reader = FilesReader(partial(read_file, self))
        self._writes_direct = self._library is not None and bool(O_DIRECT)

    def create(self, path: Path) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        if self._writes_direct:
            try:
                return os.open(path, flags | O_DIRECT, 0o600)
            except OSError as error:
                if error.errno not in NO_SUCH_FLAG:
                    raise
            self._writes_direct = False
            with suppress(FileNotFoundError):  # a file system may make it and refuse then
                os.unlink(path)
        return _uncached(os.open(path, flags, 0o600))

    def open(self, path: Path) -> int:
        fd = _uncached(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # what is asked, and no more
        return fd

    def write(self, fd: int, pieces: Sequence[memoryview]) -> int:
        if self._library is None:
            return os.writev(fd, pieces)
        return write_pieces(self._library, fd, pieces)

    def read(self, fd: int, max_bytes: int) -> bytes:
        return os.read(fd, max_bytes)

    def read_files(self, paths: Sequence[Path], max_bytes: Sequence[int]) -> Generator[Contents]:
        return self._reader.read(paths, max_bytes)

    def fsync(self, fd: int) -> None:
        if (full_sync := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
            fcntl.fcntl(fd, full_sync)  # what macOS calls fsync ends in the drive's own cache
        else:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def list_folder(self, path: Path) -> list[str]:
        return os.listdir(path)

    def facts(self, path: Path) -> FileFacts:
        found = os.stat(path)
        return FileFacts(found.st_size, found.st_mtime, found.st_ino)

    def free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def _uncached(fd: int) -> int:
    """Returns the same file, of which on macOS nothing stays in memory that goes through it."""
    if (no_cache := getattr(fcntl, "F_NOCACHE", None)) is not None:
        fcntl.fcntl(fd, no_cache, 1)
    return fd


def write_file(
    files: Files,
    path: Path,
    pieces: Sequence[memoryview],
    *,
    durably: bool = False,
) -> None:
    """Makes a new file of the pieces. What an error leaves of it is the caller's to remove."""
    fd = files.create(path)
    try:
        _write_all(files, fd, pieces)
        if durably:
            files.fsync(fd)
    except BaseException:
        _close_quietly(files, fd)
        raise
    files.close(fd)  # network file systems report a failed write here


def read_file(files: Files, path: Path, max_bytes: int) -> bytes:
    """Returns the file's first `max_bytes` bytes, or all where it has fewer."""
    fd = files.open(path)
    try:
        pieces = [files.read(fd, max_bytes)]
        left = max_bytes - len(pieces[0])
        while left and (more := files.read(fd, left)):
            pieces.append(more)
            left -= len(more)
        return b"".join(pieces)
    finally:
        _close_quietly(files, fd)


def _write_all(files: Files, fd: int, pieces: Sequence[memoryview]) -> None:
    left = list(pieces)
    while left:
        written = files.write(fd, left)
        if written <= 0:
            raise OSError("the file system took no byte and gave no reason")
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]


def _close_quietly(files: Files, fd: int) -> None:
    with suppress(OSError):
        files.close(fd)
