"""A fast BLAS is in use where the extra is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.back_ends import needs_native

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")


def _run(code: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | (environment or {}),
    )
    return done.stdout.strip()


@linux_only
def test_the_packaged_openblas_is_interposed_and_obeys_its_thread_count() -> None:
    code = """
from mlx_lm_server.runner.backends import blas
chosen = blas.preload(1)
import ctypes, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
x = mx.random.normal((512, 512))
mx.eval(x @ x)
begun = time.perf_counter()
mx.eval([x @ (x + i) for i in range(8)])
threads = ctypes.CDLL(str(chosen.path)).openblas_get_num_threads()
print(chosen.name, threads, time.perf_counter() - begun, sep=";")
"""
    name, threads, seconds = _run(code).split(";")
    assert name.startswith("OpenBLAS")
    assert threads == "1"
    # 2.1 GFLOP: the reference BLAS takes about 0.7 s, OpenBLAS about 0.02 s.
    assert float(seconds) < 0.35


@linux_only
def test_loading_it_after_mlx_is_an_error_and_not_a_silent_no_op() -> None:
    code = """
import mlx.core
from mlx_lm_server.runner.backends import blas
try:
    blas.preload()
except RuntimeError as error:
    print(error)
"""
    assert "before mlx.core" in _run(code)


has_small_gemm = needs_native


@has_small_gemm
def test_products_of_every_shape_are_right() -> None:
    """Rows, columns and depths around the tiles' edges, and those that go to the whole BLAS."""
    for rows in (1, 2, 3, 7, 8, 9, 17, 20, 24, 25, 33, 48, 64, 65, 80, 113, 192, 193):
        for columns, depth in ((512, 512), (7, 64), (200, 128), (1537, 48), (13, 512), (5, 40)):
            x, w = mx.random.normal((rows, depth)), mx.random.normal((columns, depth))
            wide = mx.random.normal((depth, 64))
            for product, left, right in ((x @ w.T, x, w.T), (x @ wide, x, wide)):
                expected = np.array(left, np.float64) @ np.array(right, np.float64)
                assert np.abs(np.array(product) - expected).max() < 3e-4


@has_small_gemm
def test_products_over_slices_of_slabs_are_right() -> None:
    slab = mx.random.normal((5, 4, 100, 64))
    keys, queries = slab[:3, :, :77], mx.random.normal((3, 4, 2, 64))
    weights = mx.random.normal((3, 4, 2, 77))
    scores = np.einsum("abqd,abkd->abqk", np.array(queries), np.array(keys))
    mixed = np.einsum("abqk,abkd->abqd", np.array(weights), np.array(keys))
    assert np.allclose(np.array(queries @ keys.swapaxes(-1, -2)), scores, atol=1e-4)
    assert np.allclose(np.array(weights @ keys), mixed, atol=1e-4)


@has_small_gemm
def test_threads_share_a_product_and_give_what_one_gives() -> None:
    code = """
from mlx_lm_server.runner.backends import blas
print(blas.preload({threads}).name)
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.random.seed(0)
x, w = mx.random.normal((9, 512)), mx.random.normal((4099, 512))
print([float(mx.abs(x @ (w + i).T).sum()) for i in range(200)][-1])
"""
    one, three = (_run(code.format(threads=n)).splitlines() for n in (1, 3))
    assert "small_gemm" in one[0]
    assert one == three


def test_without_a_compiler_the_whole_blas_does_all_products(tmp_path: Path) -> None:
    """An empty cache and an empty PATH: nothing can be compiled or renamed, and it still works."""
    code = """
from mlx_lm_server.runner.backends import blas
print(blas.preload(1).name)
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(float((mx.ones((2, 64)) @ mx.ones((64, 3))).sum()))
"""
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    name, total = _run(code, environment).splitlines()
    assert "small_gemm" not in name
    assert float(total) == 2 * 64 * 3
