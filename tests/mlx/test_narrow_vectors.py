"""A CPU with AVX-512 compiles `native` for it; here the code for AVX2 is tried on it too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lm_server import platform

RUN_TESTS = """
import sys
import pytest
from mlx_lm_server import native, platform
assert "-march=native" in native.OPTIONS
native.OPTIONS = tuple("-march=haswell" if o == "-march=native" else o for o in native.OPTIONS)
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""
FOLDER = Path(__file__).parent
FILES = ["test_span_attention.py", "test_native_products.py", "test_native_rows.py"]


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc") or "avx512f" not in platform.cpu_flags(),
    reason="needs a C compiler and a CPU with AVX-512",
)
def test_operations_in_c_are_right_with_vectors_of_eight() -> None:
    files = [str(FOLDER / name) for name in FILES]
    command = [sys.executable, "-c", RUN_TESTS, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
