"""How long a start takes.

    python -m benchmarks starts [loading ready] [--quick]

Writes results/starts-PART.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.large_model import ensure_large_model, write_tokenizer
from benchmarks.parts import Effort, Findings, console
from mlx_lm_server.config import ModelConfig
from mlx_lm_server.server.model_files import NANO_FOLDER, read_facts
from mlx_lm_server.server.model_formats import ModelFormats
from mlx_lm_server.server.tokenizer import load_tokenizer


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
    """From the command to ready, 411 M parameters: measuring, and with what was measured before,
    as far as the machine was quiet enough to keep it."""
    model = str(ensure_large_model())
    times: dict[str, list[float]] = {"measuring anew": [], "with a profile": []}
    for _ in range(effort.rounds):
        for name, options in (("measuring anew", ("--no-profile",)), ("with a profile", ())):
            with processes.running(processes.ours(model, *options)) as server:
                times[name].append(server.start_to_ready_s)
                console.print(f"  {name:16} {server.start_to_ready_s:6.1f} s")
    return [Claim(f"ready, {name}", median(s), unit="s") for name, s in times.items()], times


PARTS = {"loading": loading, "ready": ready}
