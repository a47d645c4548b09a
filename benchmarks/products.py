"""The products of one decode step, weights only, against the bandwidth of memory.

    python -m benchmarks blas [products] [--quick]

Each BLAS runs in a process of its own with one thread; times are CPU times, so that a busy
neighbour hardly shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from time import process_time

from benchmarks import reaper
from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts

# The matrices of the 30 M benchmark model: [out, in] of one layer, its layers, its head.
LAYER = ((512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (1536, 512), (512, 1536))
NUM_LAYERS = 8
HEAD = (8192, 512)
ROWS = (1, 2, 4, 8, 16, 32, 64)


def products(effort: Effort) -> Findings:
    """Milliseconds of all products of a decode step, OpenBLAS alone and with small_gemm."""
    repeats = 3 if effort.is_quick else 5 * effort.rounds
    openblas, ours = (_run(name, repeats) for name in ("openblas", "small_gemm"))
    limit_ms = ours["read_all_ms"]
    console.print(f"  reading all weights once: {limit_ms:.1f} ms ({ours['read_gb_s']:.1f} GB/s)")
    claims = []
    for rows in ROWS:
        slow, fast = openblas[str(rows)], ours[str(rows)]
        console.print(f"  {rows:3} rows   OpenBLAS {slow:6.1f} ms   with small_gemm {fast:6.1f} ms")
        claims.append(Claim(f"{rows} rows: OpenBLAS over small_gemm", slow / fast))
    return claims, {"openblas": openblas, "small_gemm": ours}


def _run(name: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.products", "--child", name, str(repeats)]
    child = reaper.start(command, stdout=subprocess.PIPE)
    answer, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{name} ended with {child.returncode}")
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def _measure(name: str, repeats: int) -> dict[str, float]:
    from mlx_lm_server.runner import blas, host_memory

    blas.preload(1, with_small_gemm=name == "small_gemm")
    host_memory.keep_freed_blocks()
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.Device(mx.cpu))
    weights = [mx.random.normal(shape) for shape in (*LAYER * NUM_LAYERS, HEAD)]
    mx.eval(weights)
    found = {}
    for rows in ROWS:
        inputs = {depth: mx.random.normal((rows, depth)) for depth in (512, 1536)}
        mx.eval(inputs)
        times = []
        for _ in range(repeats + 1):
            begun = process_time()
            mx.eval([inputs[w.shape[1]] @ w.T for w in weights])
            times.append((process_time() - begun) * 1000)
        found[str(rows)] = sorted(times[1:])[len(times) // 2 - 1]
    flat = np.ones(sum(w.size for w in weights), np.float32)
    begun = process_time()
    for _ in range(repeats):
        flat.sum()
    found["read_all_ms"] = (process_time() - begun) / repeats * 1000
    found["read_gb_s"] = flat.nbytes / found["read_all_ms"] / 1e6
    return found


PARTS = {"products": products}


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(_measure(sys.argv[2], int(sys.argv[3]))))
    else:
        raise SystemExit(run_parts("blas", PARTS, __doc__))
