"""The products of one decode step, weights only, against the bandwidth of memory; and attention.

    python -m benchmarks blas [products attention] [--quick]

Each BLAS runs in a process of its own with one thread; times are CPU times, so that a busy
neighbour hardly shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from time import process_time

from benchmarks import reaper
from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts

# The matrices of the 30 M benchmark model: [out, in] of one layer, its layers, its head.
LAYER = ((512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (1536, 512), (512, 1536))
NUM_LAYERS = 8
HEAD = (8192, 512)
ROWS = (1, 2, 4, 8, 16, 32, 64)
# Chunks of a prompt: new tokens, and the tokens before them. Heads as in that model.
CHUNKS = ((20, 2000), (64, 1000), (512, 0), (512, 1536), (128, 3000))
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64


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


def attention(effort: Effort) -> Findings:
    """Nanoseconds a score of a chunk's attention: MLX's own, our plain operations, and C."""
    found = _run("attention", 3 if effort.is_quick else 5 * effort.rounds)
    claims = []
    for new, before in CHUNKS:
        label = f"{new} after {before}"
        times = {name: found[f"{label}: {name}"] for name in ("mlx", "plain", "native")}
        shown = "   ".join(f"{name} {ns:5.1f}" for name, ns in times.items())
        console.print(f"  {label:14} {shown} ns a score")
        claims.append(Claim(f"{label}: plain over C", times["plain"] / times["native"]))
    return claims, found


def _measure_attention(repeats: int) -> dict[str, float]:
    from mlx_lm_server.runner import blas, host_memory

    blas.preload(1)
    host_memory.keep_freed_blocks()
    import mlx.core as mx

    from mlx_lm_server.runner.kernels import CpuKernel, FusedKernel

    mx.set_default_device(mx.Device(mx.cpu))
    ours = CpuKernel()
    kernels = {"mlx": FusedKernel().chunk, "plain": ours.plain_chunk, "native": ours.chunk}
    found = {}
    for new, before in CHUNKS:
        k, v = mx.random.normal((2, KV_HEADS, before + new, HEAD_DIM))
        q = mx.random.normal((HEADS, new, HEAD_DIM))
        mx.eval(k, v, q)
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(repeats + 1):
            for name, kernel in kernels.items():
                begun = process_time()
                mx.eval(kernel(q, k, v, HEAD_DIM**-0.5, before))
                times[name].append(process_time() - begun)
        num_scores = HEADS * new * (before + (new + 1) / 2)
        for name, taken in times.items():
            found[f"{new} after {before}: {name}"] = median(taken[1:]) / num_scores * 1e9
    return found


def _run(name: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.products", "--child", name, str(repeats)]
    child = reaper.start(command, stdout=subprocess.PIPE)
    answer, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{name} ended with {child.returncode}")
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def _measure(name: str, repeats: int) -> dict[str, float]:
    return _measure_attention(repeats) if name == "attention" else _measure_products(name, repeats)


def _measure_products(name: str, repeats: int) -> dict[str, float]:
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


PARTS = {"products": products, "attention": attention}


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(_measure(sys.argv[2], int(sys.argv[3]))))
    else:
        raise SystemExit(run_parts("blas", PARTS, __doc__))
