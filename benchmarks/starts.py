"""How long a start takes.

    python -m benchmarks starts [loading ready] [--quick]

Writes results/starts-PART.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.large_model import ensure_large_model, write_tokenizer
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console
from mlx_lm_server.config import ModelConfig
from mlx_lm_server.server.models.model_files import NANO_FOLDER, read_facts
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.tokenizer import load_tokenizer

# Starts that may measure until one of them is quiet enough to keep what it measured.
MAX_TRIES = 4


def loading(effort: Effort) -> Findings:
    """CPU time of a tokenizer with its chat template, and of finding its formats."""
    claims, rounds = [], {}
    with tempfile.TemporaryDirectory() as large:
        write_tokenizer(Path(large))
        (Path(large) / "config.json").write_text('{"model_type": "qwen3"}')
        for name, folder in (("nano", NANO_FOLDER), ("vocabulary of 152 000", Path(large))):
            times = [_time_loading(folder) for _ in range(4 if effort.is_quick else 12)]
            loaded_ms, found_ms = (min(column) * 1e3 for column in zip(*times, strict=True))
            console.print(f"  {name:22} loaded {loaded_ms:6.1f} ms, formats {found_ms:5.1f} ms")
            claims.append(Claim(f"{name}: tokenizer and template", loaded_ms, unit="ms"))
            claims.append(Claim(f"{name}: formats beside that", found_ms, unit="ms"))
            rounds[name] = times
    return claims, rounds


def _time_loading(folder: Path) -> tuple[float, float]:
    begun = process_time()
    tokenizer = load_tokenizer(folder, read_facts(folder))
    loaded = process_time()
    ModelFormats.of(ModelConfig(), tokenizer.template)
    return loaded - begun, process_time() - loaded


def ready(effort: Effort) -> Findings:
    """How long from the command to ready, 30 and 411 M parameters: measuring anew, and kept."""
    claims, rounds = [], {}
    models = {"30 M": str(ensure_models()["float32"]), "411 M": str(ensure_large_model())}
    with _empty_cache() as cache:
        first_s = _start_s(models["30 M"], "--no-profile")
        claims.append(Claim("30 M, the first time: C is compiled", first_s, unit="s"))
        for name, model in models.items():
            read_s = min(read_s(model) for _ in range(2))
            anew = [_start_s(model, "--no-profile") for _ in range(effort.rounds)]
            kept = _with_profile(model, cache, effort.rounds)
            times = {"read": [read_s], "anew": anew, "kept": kept}
            for kind, seconds in times.items():
                console.print(f"  {name:6} {kind:6} {'  '.join(f'{s:.1f}' for s in seconds)} s")
            most_s = 4.0 if name == "30 M" else read_s + 6.0
            claims.append(Claim(f"{name}: weights read and widened", read_s, unit="s"))
            claims.append(Claim(f"{name}: measuring anew", median(anew), at_most=most_s, unit="s"))
            if kept:
                sooner_s = median(anew) - median(kept)
                claims.append(Claim(f"{name}: sooner with a profile", sooner_s, unit="s"))
            rounds[name] = times
    return claims, rounds


def _with_profile(model: str, cache: Path, rounds: int) -> list[float]:
    """Starts with what was measured before; none where no start was quiet enough to keep it."""
    before = set(cache.glob("*/profiles/*.json"))
    for _ in range(MAX_TRIES):
        _start_s(model)
        if set(cache.glob("*/profiles/*.json")) - before:
            return [_start_s(model) for _ in range(rounds)]
    console.print("  no profile was kept: the machine was not quiet")
    return []


READ = """
import sys, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
begun = time.perf_counter()
weights = mx.load(sys.argv[1])
for name in list(weights):
    weights[name] = weights[name].astype(mx.float32)
    mx.eval(weights[name])
print(time.perf_counter() - begun)
"""


def read_s(model: str) -> float:
    """How long MLX takes to read the weights and to widen them, by itself."""
    command = [sys.executable, "-c", READ, str(Path(model) / "model.safetensors")]
    return float(subprocess.check_output(command, text=True))


def _start_s(model: str, *options: str) -> float:
    with processes.running(processes.ours(model, *options)) as server:
        return server.start_to_ready_s


@contextmanager
def _empty_cache() -> Iterator[Path]:
    """Gives the servers a folder of their own for compiled code and profiles."""
    name = "XDG_CACHE_HOME"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


PARTS = {"loading": loading, "ready": ready}
