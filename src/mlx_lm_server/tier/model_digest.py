"""Tells which model this is by a digest of its weights that reads a few megabytes of them.

Of each weights file: the whole safetensors header (names, shapes, offsets), the size, and pages
sampled evenly over the data, the last one included. Two fine-tunes of one base differ in nearly
every page. config.json and an adapter's count too, since rope and norm settings change what K and V
mean.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec

PAGE_BYTES = 4096
SAMPLED_PAGES = 256
MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
MAX_CACHED = 256
CONFIG_FILES = ("config.json", "adapter_config.json")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def model_digest(folder: Path, cache_file: Path | None = None) -> bytes:
    """Returns sha256 over a folder's weights and config. Raises OSError where they cannot be read.

    `cache_file` keeps the digests of weights files by path, size and modification time; without
    it, or where it cannot be used, the pages are read again.
    """
    digest = sha256()
    for name in CONFIG_FILES:
        with suppress(FileNotFoundError):
            _add(digest, name.encode(), (folder / name).read_bytes())
    cache = _DigestCache(cache_file)
    for path in sorted(folder.glob("*.safetensors")):
        _add(digest, path.name.encode(), cache.digest_of(path))
    cache.write()
    return digest.digest()


def namespace_digest(parts: Mapping[str, str | bytes]) -> bytes:
    """Returns sha256 over named parts: model, adapter, layout, quantisation, rank, …"""
    digest = sha256()
    for name, value in sorted(parts.items()):
        _add(digest, name.encode(), value if isinstance(value, bytes) else value.encode())
    return digest.digest()


def weights_file_digest(path: Path) -> bytes:
    """Returns sha256 over a safetensors file's size, header and sampled pages. Raises OSError."""
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        header_bytes = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES, size)
        _add(digest, str(size).encode(), length, file.read(header_bytes))
        for offset in _sampled(8 + header_bytes, size):
            file.seek(offset)
            digest.update(file.read(PAGE_BYTES))
    return digest.digest()


def _sampled(start: int, end: int) -> Iterator[int]:
    """Yields where the sampled pages begin: all of a small file, the last page always."""
    last = max(start, end - PAGE_BYTES)
    step = max(PAGE_BYTES, (last - start) // SAMPLED_PAGES)
    yield from range(start, last, step)
    yield last


def _add(digest: _Hash, *parts: bytes) -> None:
    """Adds each part after its length, so that no two lists of parts look alike."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


class _DigestCache:
    """Digests of weights files in a small JSON file. It may be lost or written twice at a time."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._is_changed = False
        if path is not None:
            with suppress(OSError, msgspec.DecodeError):
                self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, str])

    def digest_of(self, weights: Path) -> bytes:
        real = weights.resolve()
        found = real.stat()
        key = f"{real}:{found.st_size}:{found.st_mtime_ns}"
        with suppress(ValueError):
            if len(digest := bytes.fromhex(self._known.get(key, ""))) == 32:
                return digest
        digest = weights_file_digest(real)
        self._known[key] = digest.hex()
        self._is_changed = True
        return digest

    def write(self) -> None:
        if self._path is None or not self._is_changed:
            return
        newest = dict(list(self._known.items())[-MAX_CACHED:])
        temporary = self._path.with_name(f"{self._path.name}.{secrets.token_hex(8)}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(newest))
            os.replace(temporary, self._path)
