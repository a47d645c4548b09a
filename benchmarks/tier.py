"""The disk tier by itself, without an engine.

    python -m benchmarks.tier [start | bytes | speed] [--quick]

Blocks of 16 tokens, as nano has them (4 KiB a token) and as a 4B model has them (144 KiB a token).
Reads go past the page cache, as the server's do.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts
from mlx_lm_server.config import TierConfig
from mlx_lm_server.tier import Namespace, Record, SsdStore, Tensor, TierSettings, Wanted

NAMESPACE = Namespace(bytes(32), {"model": "benchmark"})
BLOCK_TOKENS = 16
MIB = 1 << 20
BLOCK_BYTES = {"nano": BLOCK_TOKENS * 4096, "4B": BLOCK_TOKENS * 36 * 2 * 8 * 128 * 2}
# Seconds of serving, and blocks that leave in each: one slow stream up to a full batch.
PACES = {"nano": ((60, 1), (60, 4), (20, 50)), "4B": ((10, 1), (5, 4))}
FULL_AT_BLOCKS = 100


class SteadyClock:
    """Time that passes when the benchmark says so."""

    def __init__(self) -> None:
        self._now_s = 1.8e9

    def wall_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._now_s

    def pass_time(self, seconds: float) -> None:
        self._now_s += seconds


def make_blocks(count: int, nbytes: int) -> list[Record]:
    """A chain; all share their bytes, which no measure looks at."""
    key, value = os.urandom(nbytes // 2), os.urandom(nbytes // 2)
    shape = (1, BLOCK_TOKENS, nbytes // 4 // BLOCK_TOKENS)
    tensors = (Tensor("BF16", shape, key), Tensor("BF16", shape, value))
    names = [bytes(32), *(os.urandom(32) for _ in range(count))]
    ids = tuple(range(100_000, 100_000 + BLOCK_TOKENS))
    return [
        Record(name, "block", parent, ids, BLOCK_TOKENS * n, tensors)
        for n, (parent, name) in enumerate(pairwise(names), start=1)
    ]


@contextmanager
def cache_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tier-") as folder:
        yield Path(folder)


def start(effort: Effort) -> Findings:
    """Seconds until a store on 100 000 files knows them all, and what that costs the engine."""
    count = 10_000 if effort.is_quick else 100_000
    with cache_folder() as folder:
        settings = TierSettings(folder, TierConfig(ssd_ttl_days=0))
        inline = TierConfig(ssd_async_writes=False, ssd_ttl_days=0)
        fill = SsdStore(TierSettings(folder, inline), NAMESPACE)
        for block in make_blocks(count, 512):
            fill.save(block)
            fill.poll()
        fill.close(60)
        found = [_start_once(settings, count) for _ in range(effort.rounds)]
    open_s, longest_gap_s = (median(column) for column in zip(*found, strict=True))
    claims = [
        Claim(f"start with {count} files", open_s, at_most=1.0, unit="s"),
        Claim("longest gap of the engine's thread meanwhile", longest_gap_s * 1000, unit="ms"),
    ]
    return claims, {"rounds": found}


def _start_once(settings: TierSettings, count: int) -> tuple[float, float]:
    begun = before = perf_counter()
    store = SsdStore(settings, NAMESPACE)
    longest_s = open_s = 0.0
    while perf_counter() - begun < 3.0:  # the sweep runs in this time too
        store.poll()
        if store.is_open and not open_s:
            open_s = perf_counter() - begun
            assert store.stats().stored_records == count
        sleep(0.001)
        longest_s = max(longest_s, perf_counter() - before - 0.001)
        before = perf_counter()
    store.close(10)
    return open_s, longest_s


def written(effort: Effort) -> Findings:
    """Bytes written per byte of K and V, index and file headers included."""
    details = {}
    for model, paces in PACES.items():
        for seconds, blocks_per_s in paces:
            name = f"{model}, {blocks_per_s} blocks a second"
            details[name] = _written_share(BLOCK_BYTES[model], seconds, blocks_per_s)
    name = f"nano, 4 blocks a second, evicting beyond {FULL_AT_BLOCKS}"
    details[name] = _written_share(BLOCK_BYTES["nano"], 120, 4, FULL_AT_BLOCKS)
    claims = [
        Claim(f"bytes written per byte of KV: {name}", share, at_most=1.1)
        for name, share in details.items()
    ]
    return claims, details


def _written_share(nbytes: int, seconds: int, blocks_per_s: int, full_at: int = 0) -> float:
    clock = SteadyClock()
    with cache_folder() as folder:
        limit_gb = full_at * (nbytes + 4096) / 1e9
        flags = TierConfig(ssd_async_writes=False, ssd_ttl_days=0, ssd_max_size_gb=limit_gb)
        store = SsdStore(TierSettings(folder, flags), NAMESPACE, clock=clock)
        store.poll()
        before = _bytes_written()
        blocks = iter(make_blocks(seconds * blocks_per_s, nbytes))
        for _ in range(seconds):
            for _ in range(blocks_per_s):
                store.save(next(blocks))
            clock.pass_time(1.0)
            store.poll()
        store.close(10)
        taken = _bytes_written() - before
    return taken / (seconds * blocks_per_s * nbytes)


def _bytes_written() -> int:
    """What this process gave to write calls, sqlite's included. Linux only."""
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("wchar:") + 1])


def speed(effort: Effort) -> Findings:
    """MiB/s to the disk and back, and what a call costs the engine's thread."""
    claims, details = [], {}
    total = 64 * MIB if effort.is_quick else 512 * MIB
    for model, nbytes in BLOCK_BYTES.items():
        for flags in (TierConfig(), TierConfig(ssd_durability="persistent")):
            part = total // 8 if flags.is_persistent else total
            rounds = [_speed_once(nbytes, part, flags) for _ in range(effort.rounds)]
            save, load, call_ms = (median(column) for column in zip(*rounds, strict=True))
            name = f"{model}, {flags.ssd_durability}"
            details[name] = rounds
            console.print(f"  {name:20} save {save:6.0f} load {load:6.0f} MiB/s")
            claims += [
                Claim(f"save: {name}", save, unit="MiB/s"),
                Claim(f"load: {name}", load, unit="MiB/s"),
                Claim(f"longest step: {name}", call_ms, at_most=20, unit="ms"),
            ]
    return claims, details


def _speed_once(nbytes: int, total: int, flags: TierConfig) -> tuple[float, float, float]:
    blocks = make_blocks(max(4, total // nbytes), nbytes)
    mib = len(blocks) * nbytes / MIB
    longest_s = 0.0
    with cache_folder() as folder:
        settings = TierSettings(folder, replace(flags, ssd_ttl_days=0))
        store = SsdStore(settings, NAMESPACE)
        while not store.is_open:
            store.poll()
        begun = perf_counter()
        for block in blocks:
            assert store.wait_for_room(block.nbytes, 60)
            before = perf_counter()
            store.save(block)
            store.poll()
            longest_s = max(longest_s, perf_counter() - before)
        assert store.flush(600)
        save_s = perf_counter() - begun
        store.close(10)
        load_s = _load_s(settings, blocks)
    return mib / save_s, mib / load_s, longest_s * 1000


def _load_s(settings: TierSettings, blocks: list[Record]) -> float:
    store = SsdStore(settings, NAMESPACE)
    while not store.is_open:
        store.poll()
    begun = perf_counter()
    store.prefetch([Wanted(block.name, block.token_ids) for block in blocks], "reader")
    while not (read := store.poll()):
        sleep(0.001)
    load_s = perf_counter() - begun
    assert len(read[0].records) == len(blocks)
    store.close(10)
    return load_s


PARTS = {"start": start, "bytes": written, "speed": speed}


if __name__ == "__main__":
    raise SystemExit(run_parts("tier", PARTS, __doc__))
