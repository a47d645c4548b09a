"""What can be found out about this machine without an engine."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import httpx

from mlx_lm_server import platform
from mlx_lm_server.commands.doctor.findings import Finding, note, wrong
from mlx_lm_server.config import Config, ServerConfig, TierConfig
from mlx_lm_server.errors import ServerError
from mlx_lm_server.folders import nearest_existing
from mlx_lm_server.native import compiler
from mlx_lm_server.server.boot import disk_tier_of
from mlx_lm_server.server.listening import allow_many_files, listen

NEEDED = ("mlx", "mlx-lm")
PACKAGES = ("mlx-lm-server", *NEEDED, "tokenizers", "uvicorn", "httptools", "uvloop")
# Which of them is there depends on the system and on what was installed.
MAYBE = ("mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "scipy-openblas32")
PROBE_BYTES = 64 << 20
PIECE_BYTES = 4 << 20
LEAST_FREE_BYTES = 1 << 30
# A restore should be faster than a slow prefill: a token of a 4 B model holds 150 kB.
SLOW_BYTES_PER_S = 100e6
FEW_FILES = 1024
LIVEZ_S = 2.0


def look_around(config: Config) -> Iterator[Finding]:
    """Yields each finding when it is known."""
    yield machine()
    yield versions()
    if platform.is_linux() and platform.is_x86() and compiler.find() is None:
        yield note(
            "compiler",
            "there is no C compiler, so that a CPU runs without code of our own, slower",
            "install gcc or clang",
        )
    yield open_files()
    yield port(config.server)
    yield disk_tier(config.tier)


def machine() -> Finding:
    memory = platform.memory_bytes()
    size = f", {memory / 10**9:.0f} GB of memory" if memory else ""
    cores = platform.usable_cores()
    words = f"{platform.system_and_machine()}, {platform.cpu_name()}, {cores} cores{size}"
    load = os.getloadavg()[0]
    busy = f", load {load:.1f}"
    if load > 2 * cores:
        return note("machine", words + busy, "other programs are busy: numbers will be worse")
    return Finding("machine", words + busy)


def versions() -> Finding:
    """Says which of the packages are there; a missing one stops the engine."""
    found = {name: _version(name) for name in (*PACKAGES, *MAYBE)}
    words = ", ".join(
        [f"Python {platform.python()}", *(f"{name} {text}" for name, text in found.items() if text)]
    )
    missing = [name for name in NEEDED if not found[name]]
    if missing:
        return wrong(
            "versions",
            f"{words}; {' and '.join(missing)} cannot be found",
            "install mlx-lm-server anew with the extra cpu, cuda12 or cuda13 (none on a Mac)",
        )
    return Finding("versions", words)


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def open_files() -> Finding:
    allow_many_files()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "as many as there are")
    if soft <= FEW_FILES:
        return note(
            "open files", f"at most {soft}, each connection being one", "raise `ulimit -Hn`"
        )
    return Finding("open files", f"at most {soft}")


def port(server: ServerConfig) -> Finding:
    """Tries to listen where `serve` would."""
    if server.uds is not None:
        subject = "socket"
        where = "the Unix socket"
    else:
        subject, where = "port", f"port {server.port}"
    try:
        with listen(server):
            return Finding(subject, f"{where} is free")
    except ServerError:
        if server.uds is None and _is_ours(server):
            return note(subject, f"an mlx-lm-server answers at {where} already")
        return wrong(
            subject,
            f"{where} cannot be listened on",
            "end the program that has it, or choose another: --uds" if server.uds is not None
            else "end the program that has it, or choose another one and host: --port, --host",
        )  # fmt: skip


def _is_ours(server: ServerConfig) -> bool:
    host = f"[{server.host}]" if ":" in server.host else server.host
    with suppress(httpx.HTTPError, ValueError):
        url = f"http://{host}:{server.port}/livez"
        answer = httpx.get(url, timeout=LIVEZ_S, trust_env=False).json()
        return isinstance(answer, dict) and answer.get("status") == "alive"
    return False


# ---- the disk


def disk_tier(config: TierConfig) -> Finding:
    """Says how much room there is for the cache on disk, and how fast it is there. Raises
    ConfigError for a folder that can never be one."""
    if config.no_ssd:
        return Finding("disk", "the cache on disk is off (--no-ssd)")
    folder = nearest_existing(Path(disk_tier_of(config).folder))
    elsewhere = "choose another folder (--ssd-cache-dir), or turn it off (--no-ssd)"
    try:
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < LEAST_FREE_BYTES + PROBE_BYTES:
            return wrong("disk", f"{free_bytes / 10**9:.1f} GB are free for the cache", elsewhere)
        write_s, read_s = _probe(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return wrong("disk", f"the folder of the cache cannot be used: {reason.lower()}", elsewhere)
    read, written = PROBE_BYTES / read_s, PROBE_BYTES / write_s
    words = (
        f"{free_bytes / 10**9:.0f} GB free, {read / 10**6:.0f} MB a second read, "
        f"{written / 10**6:.0f} written"
    )
    if read < SLOW_BYTES_PER_S:
        return note("disk", words, f"slow for a cache: {elsewhere}")
    return Finding("disk", words)


def _probe(folder: Path) -> tuple[float, float]:
    """Returns how long a file took to be written and read. No trace of it is left. Where the system
    does not drop what it has just written from its memory, reading looks faster than it is."""
    piece = os.urandom(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begun_s = perf_counter()
        for _ in range(PROBE_BYTES // PIECE_BYTES):
            file.write(piece)
        os.fsync(file.fileno())
        write_s = perf_counter() - begun_s
        platform.forget_pages(file.fileno())
        file.seek(0)
        begun_s = perf_counter()
        while file.read(PIECE_BYTES):
            pass
        return write_s, perf_counter() - begun_s
