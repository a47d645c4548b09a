"""What was measured of a model on this machine, kept for the next start.

A profile is of one shape of model (its configuration and the sizes of its files), held in one way,
on one device with so many cores, with these versions: anything else is measured anew. It is kept
only where no two runs of one thing differed and the machine was quiet, and serving corrects it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.submitting import Submitting
from mlx_lm_server.folders import cache_folder

log = logging.getLogger(__name__)

VERSION = 3
# Of all cores, what others may take while a measurement is to be kept.
QUIET_SHARE = 0.15


def profile_path(model: Path, facts: Mapping[str, str], root: Path | None = None) -> Path:
    """Returns where the profile of a model is kept. Raises OSError for a folder without a
    config.json."""
    sizes = sorted((f.name, f.stat().st_size) for f in model.glob("*.safetensors"))
    parts = [VERSION, (model / "config.json").read_text(), sizes, sorted(facts.items())]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return (root or cache_folder()) / "profiles" / f"{name}.json"


def load_profile(path: Path) -> Measured | None:
    """Returns what was measured before; None where nothing was, or it cannot be read."""
    try:
        found = json.loads(path.read_text())
        costs = StepCosts(**{name: _positive(cost) for name, cost in found["costs"].items()})
        threads = found["num_threads"]
        return Measured(
            None if threads is None else int(_positive(threads)),
            costs,
            _forward_bytes(found["forward_bytes"]),
            float(_positive(found["copy_bytes_per_s"])),
            _submitting(found["submitting"]),
        )
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        msgspec.MsgspecError,
    ) as error:
        log.warning("the profile %s cannot be read and is measured anew: %s", path, error)
        return None


def save_profile(path: Path, measured: Measured) -> None:
    """Writes a profile whole or not at all; where that fails, the next start measures again."""
    about: dict[str, Any] = {
        "num_threads": measured.num_threads,
        "costs": asdict(measured.costs),
        "forward_bytes": asdict(measured.forward_bytes),
        "copy_bytes_per_s": measured.copy_bytes_per_s,
        "submitting": None if measured.submitting is None else asdict(measured.submitting),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            whole.write_text(json.dumps(about))
            os.replace(whole, path)
    except OSError as error:
        log.info("the profile is not kept: %s", error)


def _forward_bytes(found: Any) -> ForwardBytes:
    forward_bytes = msgspec.convert(found, ForwardBytes)
    _positive(forward_bytes.per_token)
    _positive(1 + min(forward_bytes.per_pair, forward_bytes.per_read_token))
    return forward_bytes


def encode_measured(measured: Measured) -> bytes:
    """Returns what was measured in a form that a next engine takes."""
    return msgspec.msgpack.encode(measured)


def decode_measured(data: bytes) -> Measured | None:
    """Returns what `encode_measured` wrote; None for no bytes."""
    return msgspec.msgpack.decode(data, type=Measured) if data else None


def _submitting(found: Any) -> Submitting | None:
    submitting = msgspec.convert(found, Submitting | None)
    for trial in () if submitting is None else (submitting.small, submitting.large):
        _positive(trial.late_s)
        _positive(trial.early_s)
    return submitting


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise ValueError(f"{value!r} is no measurement")
    return value


class OthersWork:
    """Tells how much of the machine other processes took since it was made."""

    def __init__(self) -> None:
        self._all, self._own = _busy_s(), _own_s()
        self._total = sum(psutil.cpu_times())

    @property
    def is_little(self) -> bool:
        total = sum(psutil.cpu_times()) - self._total
        others = (_busy_s() - self._all) - (_own_s() - self._own)
        return bool(others <= QUIET_SHARE * max(total, 1e-9))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
