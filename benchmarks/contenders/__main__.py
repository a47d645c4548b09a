"""A contender in its own process: what it is on a line, then one JSON load a line in and one JSON
result a line out.

python -m benchmarks.contenders NAME --model FOLDER [--threads N]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import msgspec

from benchmarks.contenders.load import About, Load, measure
from mlx_lm_server.runner.backends import blas

CONTENDERS = {
    "engine": ("engine", "Engine"),
    "engine_unhurried": ("engine", "UnhurriedEngine"),
    "engine_building": ("engine", "BuildingEngine"),
    "bare": ("bare", "BareLoop"),
    "plain": ("bare", "PlainLoop"),
    "batch_generate": ("batch_generate", "BatchGenerate"),
    "batch_generate_small_gemm": ("batch_generate", "BatchGenerate"),
}
# What anybody gets who preloads an OpenBLAS; the others have our small_gemm in front of it.
PLAIN_OPENBLAS = ("plain", "batch_generate")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not answer
    has_small_gemm = given.name not in PLAIN_OPENBLAS
    chosen = blas.preload(given.threads, with_small_gemm=has_small_gemm)
    import mlx.core as mx

    module, attribute = CONTENDERS[given.name]
    make = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), attribute)
    contender = make(given.model, given.threads, chosen)
    answers.write(msgspec.json.encode(About(str(chosen), contender.runs)) + b"\n")
    for line in sys.stdin.buffer:
        load = msgspec.json.decode(line, type=Load)
        answers.write(msgspec.json.encode(measure(contender, load, mx)) + b"\n")


if __name__ == "__main__":
    main()
