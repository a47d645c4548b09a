"""Disks that fail on demand, a clock that jumps on demand, and records to store on them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any

from mlx_lm_server.config import TierConfig
from mlx_lm_server.tier import (
    Namespace,
    Record,
    SsdStore,
    Tensor,
    TierSettings,
    Wanted,
    namespace_digest,
)
from mlx_lm_server.tier.files import FileFacts, OsFiles
from mlx_lm_server.tier.reading import Contents

NAMESPACE = Namespace(namespace_digest({"model": "tiny"}), {"model": "tiny"})
BLOCK_TOKENS = 16
PATIENCE_S = 10.0


class Killed(BaseException):
    """What a kill -9 is to code that runs inline: nothing after it happens."""


class FakeClock:
    def __init__(self) -> None:
        self.wall = time.time()  # as the files' own times
        self.monotonic = 1000.0

    def wall_s(self) -> float:
        return self.wall

    def monotonic_s(self) -> float:
        return self.monotonic

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


class FaultFiles:
    """The real files; `before[call]` is run before a call with its arguments and may raise, and
    `instead[call]` answers in its place."""

    def __init__(self) -> None:
        self._real = OsFiles()
        self.before: dict[str, Callable[..., None]] = {}
        self.instead: dict[str, Callable[..., Any]] = {}
        self.calls: Counter[str] = Counter()
        self.bytes_written = 0

    def _do(self, call: str, *args: Any) -> Any:
        self.calls[call] += 1
        if call in self.before:
            self.before[call](*args)
        if call in self.instead:
            return self.instead[call](*args)
        return getattr(self._real, call)(*args)

    def fail(self, call: str, error: int, *, times: int | None = None, only: str = "") -> None:
        """Raise OSError, so many times; `only` for paths that contain it."""
        left = [times]

        def raise_it(*args: Any) -> None:
            if only and not any(only in str(arg) for arg in args):
                return
            if left[0] is None or left[0] > 0:
                left[0] = None if left[0] is None else left[0] - 1
                raise OSError(error, "injected")

        self.before[call] = raise_it

    def heal(self) -> None:
        self.before.clear()
        self.instead.clear()

    def create(self, path: Path) -> int:
        return self._do("create", path)

    def open(self, path: Path) -> int:
        return self._do("open", path)

    def write(self, fd: int, pieces: Sequence[memoryview]) -> int:
        written = self._do("write", fd, pieces)
        self.bytes_written += written
        return written

    def read(self, fd: int, max_bytes: int) -> bytes:
        return self._do("read", fd, max_bytes)

    def read_files(self, paths: Sequence[Path], max_bytes: Sequence[int]) -> Generator[Contents]:
        """Faults come file by file."""
        real = self._real.read_files(paths, max_bytes)
        for path in paths:
            self.calls["read_files"] += 1
            fault = self._fault_before_reading(path)
            contents = next(real)
            if "read_files" in self.instead and not isinstance(contents, OSError):
                contents = self.instead["read_files"](contents)
            yield fault or contents

    def _fault_before_reading(self, path: Path) -> OSError | None:
        try:
            if "read_files" in self.before:
                self.before["read_files"](path)
        except OSError as error:
            return error
        return None

    def fsync(self, fd: int) -> None:
        self._do("fsync", fd)

    def close(self, fd: int) -> None:
        self._do("close", fd)

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", source, target)

    def unlink(self, path: Path) -> None:
        self._do("unlink", path)

    def make_folder(self, path: Path) -> None:
        self._do("make_folder", path)

    def sync_folder(self, path: Path) -> None:
        self._do("sync_folder", path)

    def list_folder(self, path: Path) -> list[str]:
        return self._do("list_folder", path)

    def facts(self, path: Path) -> FileFacts:
        return self._do("facts", path)

    def free_bytes(self, path: Path) -> int:
        return self._do("free_bytes", path)


class Pin:
    """Holds the io thread inside one call until it is released."""

    def __init__(self, files: FaultFiles, call: str) -> None:
        self._reached, self._released = threading.Event(), threading.Event()
        self._files, self._call = files, call
        files.before[call] = self._hold

    def _hold(self, *_args: Any) -> None:
        self._reached.set()
        assert self._released.wait(PATIENCE_S)

    def wait_until_held(self) -> None:
        assert self._reached.wait(PATIENCE_S)

    def release(self) -> None:
        self._files.before.pop(self._call, None)
        self._released.set()


def make_record(
    seed: int, *, nbytes: int = 1024, parent: Record | None = None, kind: str = "block"
) -> Record:
    random = Random(seed)
    half = nbytes // 2
    return Record(
        name=random.randbytes(32),
        kind="state" if kind == "state" else "block",
        parent=parent.name if parent else bytes(32),
        token_ids=tuple(random.randrange(50_000) for _ in range(BLOCK_TOKENS)),
        num_tokens=(parent.num_tokens if parent else 0) + BLOCK_TOKENS,
        tensors=(
            Tensor("F32", (half // 4,), random.randbytes(half)),
            Tensor("BF16", (1, half // 2), random.randbytes(half)),
        ),
    )


def make_chain(seed: int, length: int, nbytes: int = 1024) -> list[Record]:
    chain = [make_record(seed, nbytes=nbytes)]
    while len(chain) < length:
        chain.append(make_record(seed + len(chain), nbytes=nbytes, parent=chain[-1]))
    return chain


def wanted(records: Sequence[Record]) -> list[Wanted]:
    return [Wanted(record.name, record.token_ids) for record in records]


def as_bytes(record: Record) -> Record:
    """With tensors that compare by content."""
    tensors = (replace(each, data=bytes(each.data)) for each in record.tensors)
    return replace(record, tensors=tuple(tensors))


def settings(folder: Path, **given: Any) -> TierSettings:
    """Flags by their names without `ssd_`, the limits of size and age in bytes and seconds, and
    bounds that have no flag."""
    given = {"flush_interval_s": 0.02, **given}
    for name, flag, unit in (("max_size_bytes", "max_size_gb", 1e9), ("ttl_s", "ttl_days", 86400)):
        if name in given:
            given[flag] = given.pop(name) / unit
    flags = {
        flag.name: given.pop(name)
        for flag in fields(TierConfig)
        if (name := flag.name.removeprefix("ssd_")) in given
    }
    return TierSettings(folder, TierConfig(**flags), **given)


def open_store(folder: Path, files: FaultFiles | None = None, **given: Any) -> SsdStore:
    clock = given.pop("clock", None)
    namespace = given.pop("namespace", NAMESPACE)
    store = SsdStore(settings(folder, **given), namespace, files=files, clock=clock)
    if clock is None:
        wait_until(lambda: bool(store.poll()) or store.is_open)
    else:
        store.poll()
    return store


def save_all(store: SsdStore, records: Sequence[Record], owner: str = "") -> None:
    for record in records:
        assert store.begin_save(record.nbytes)
        store.save(record, owner)
    assert store.flush(PATIENCE_S)


def load(store: SsdStore, records: Sequence[Record], owner: str = "reader") -> list[Record]:
    """What a prefetch gives, checked against what was saved: never another byte."""
    ticket = store.prefetch(wanted(records), owner)
    ends_s = time.monotonic() + PATIENCE_S
    while True:
        for read in store.poll():
            assert read.ticket == ticket
            found = [as_bytes(record) for record in read.records]
            assert found == [as_bytes(record) for record in records[: len(found)]]
            return found
        assert time.monotonic() < ends_s, "the prefetch never ended"
        time.sleep(0.0005)


def wait_until(holds: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends_s, "it never came to hold"
        time.sleep(0.001)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.safetensors"))


def remains_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/tmp/*"))


def settled(store: SsdStore, turns: int = 2000) -> None:
    """Inline: poll until the sweep has ended and all is committed."""
    for _ in range(turns):
        store.poll()
        if not store._io.disk.tidy():  # type: ignore[attr-defined]
            break
    assert store.flush(PATIENCE_S)
