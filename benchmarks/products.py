"""The products of one decode step, weights only, against the bandwidth of memory; and what else
goes through the BLAS.

    python -m benchmarks blas [products attention swiglu] [--quick]

Each BLAS runs in a process of its own with one thread; times are CPU times, so that a busy
neighbour hardly shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import TYPE_CHECKING

from benchmarks import reaper
from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts

if TYPE_CHECKING:
    import mlx.core as mx

# The matrices of the 30 M benchmark model: [out, in] of one layer, its layers, its head.
LAYER = ((512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (1536, 512), (512, 1536))
NUM_LAYERS = 8
HEAD = (8192, 512)
ROWS = (1, 2, 4, 8, 16, 32, 64)
# Chunks of a prompt: new tokens, and the tokens before them. Heads as in that model.
CHUNKS = ((20, 2000), (64, 1000), (512, 0), (512, 1536), (128, 3000))
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
# SwiGLU of one layer, of so many tokens.
SWIGLU_TOKENS, SWIGLU_WIDTH = (1, 40, 512), 1536


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


def swiglu(effort: Effort) -> Findings:
    """Microseconds of one layer's SwiGLU: mlx-lm's, four operations that MLX fused, and C."""
    found = _run("swiglu", 10 if effort.is_quick else 20 * effort.rounds)
    claims = []
    for tokens in SWIGLU_TOKENS:
        times = {name: found[f"{tokens}: {name}"] for name in ("mlx", "fused", "native")}
        shown = "   ".join(f"{name} {us:7.0f}" for name, us in times.items())
        console.print(f"  {tokens:4} tokens   {shown} us")
        claims.append(
            Claim(f"SwiGLU of {tokens} tokens: fused over C", times["fused"] / times["native"])
        )
    return claims, found


def _measure_swiglu(repeats: int) -> dict[str, float]:
    _prepare()
    import mlx.core as mx
    from mlx_lm.models import activations

    from mlx_lm_server.runner import patches
    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.backends.x86 import fast_math

    ways = {"mlx": activations.swiglu, "fused": fast_math.swiglu}
    patches.install(choose())
    ways["native"] = activations.swiglu
    found = {}
    for tokens in SWIGLU_TOKENS:
        gate, x = 4 * mx.random.normal((2, tokens, 1, SWIGLU_WIDTH))
        mx.eval(gate, x)
        calls = {name: partial(way, gate, x) for name, way in ways.items()}
        for name, taken_s in _medians_s(calls, repeats).items():
            found[f"{tokens}: {name}"] = taken_s * 1e6
    return found


def _measure_attention(repeats: int) -> dict[str, float]:
    _prepare()
    import mlx.core as mx

    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.backends.x86.kernel import CpuKernel

    ours, plain = CpuKernel(), choose("plain").kernel(mx.float32)
    kernels = {"mlx": plain.chunk, "plain": ours.plain_chunk, "native": ours.chunk}
    found = {}
    for new, before in CHUNKS:
        k, v = mx.random.normal((2, KV_HEADS, before + new, HEAD_DIM))
        q = mx.random.normal((HEADS, new, HEAD_DIM))
        mx.eval(k, v, q)
        num_scores = HEADS * new * (before + (new + 1) / 2)
        calls = {
            name: partial(kernel, q, k, v, HEAD_DIM**-0.5, before)
            for name, kernel in kernels.items()
        }
        for name, taken_s in _medians_s(calls, repeats).items():
            found[f"{new} after {before}: {name}"] = taken_s / num_scores * 1e9
    return found


def _prepare(with_small_gemm: bool = True) -> None:
    """Our library and MLX, on one thread."""
    from mlx_lm_server.runner.backends import blas

    blas.preload(1, with_small_gemm=with_small_gemm)
    import mlx.core as mx

    from mlx_lm_server.runner.backends import host_memory

    host_memory.keep_freed_blocks()
    mx.set_default_device(mx.Device(mx.cpu))


def _medians_s(calls: dict[str, Callable[[], mx.array]], repeats: int) -> dict[str, float]:
    """CPU time of each, one after the other, without the first round."""
    import mlx.core as mx

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            begun = process_time()
            mx.eval(call())
            times[name].append(process_time() - begun)
    return {name: median(taken[1:]) for name, taken in times.items()}


def _run(name: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.products", "--child", name, str(repeats)]
    child = reaper.start(command, stdout=subprocess.PIPE)
    answer, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{name} ended with {child.returncode}")
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def _measure(name: str, repeats: int) -> dict[str, float]:
    match name:
        case "attention":
            return _measure_attention(repeats)
        case "swiglu":
            return _measure_swiglu(repeats)
        case _:
            return _measure_products(name, repeats)


def _measure_products(name: str, repeats: int) -> dict[str, float]:
    _prepare(with_small_gemm=name == "small_gemm")
    import mlx.core as mx
    import numpy as np

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


PARTS = {"products": products, "attention": attention, "swiglu": swiglu}


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(_measure(sys.argv[2], int(sys.argv[3]))))
    else:
        raise SystemExit(run_parts("blas", PARTS, __doc__))
