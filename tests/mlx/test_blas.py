"""A fast BLAS is in use where the extra is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@linux_only
def test_the_packaged_openblas_is_interposed_and_obeys_its_thread_count() -> None:
    code = """
from mlx_lm_server.runner import blas
chosen = blas.preload(1)
import ctypes, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
x = mx.random.normal((512, 512))
mx.eval(x @ x)
begun = time.perf_counter()
mx.eval([x @ (x + i) for i in range(8)])
threads = ctypes.CDLL(str(chosen.path)).openblas_get_num_threads()
print(chosen.name, threads, time.perf_counter() - begun)
"""
    name, _version, threads, seconds = _run(code).split()
    assert name == "OpenBLAS"
    assert threads == "1"
    # 2.1 GFLOP: the reference BLAS takes about 0.7 s, OpenBLAS about 0.02 s.
    assert float(seconds) < 0.35


@linux_only
def test_loading_it_after_mlx_is_an_error_and_not_a_silent_no_op() -> None:
    code = """
import mlx.core
from mlx_lm_server.runner import blas
try:
    blas.preload()
except RuntimeError as error:
    print(error)
"""
    assert "before mlx.core" in _run(code)
