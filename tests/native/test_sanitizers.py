"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer: they find nothing in the tests
of this folder, nor in some that reach it through MLX; and they find what is planted."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lm_server import native
from tests.native.door import needs_library

SANITIZED = """
import sys
from mlx_lm_server import native
native.OPTIONS = (
    "-O1",
    "-g",
    "-march=native",
    "-ffp-contract=off",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)
native.COMPILE_TIMEOUT_S = 280
"""
COMPILE = """
sys.exit(not all(map(native.compiled, sys.argv[1:])))
"""
RUN_TESTS = """
import pytest
assert b"__asan_init" in native.compiled("products").read_bytes()
sys.exit(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", *sys.argv[1:]]))
"""
DRAW = """
import ctypes
import numpy as np
from mlx_lm_server.runner.backends.x86.native_draw import _RowParams
library = native.load(sys.argv[1])
arrays = np.ones(65, np.float32), np.empty(130, np.float32), np.zeros(1, np.int32)
logits, scratch, tokens = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
row = (_RowParams * 1)(_RowParams(1.0, 0.0, 1.0, 5, 7, 11))
print("drawn", library.draw_rows(1, 65, logits, row, scratch, tokens))
"""
HERE = Path(__file__).parent
FILES = [
    *(path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)),
    *(HERE.parent / "mlx" / f"test_{name}.py" for name in ("native_products", "plane_spans")),
]
PLANTS = {
    "an overrun": (
        "keep_from(weights, n, kth_largest(race, n",
        "race[n] = 0.0f; keep_from(weights, n, kth_largest(race, n",
        "heap-buffer-overflow",
    ),
    "an overflow": (
        "return 1;\n}",
        "return vocab_size + num_rows * 2147483647;\n}",
        "signed integer overflow",
    ),
}


@functools.cache
def runtime() -> str | None:
    """Returns what must be loaded before a program for libraries with sanitizers in it; None where
    the compiler has none. It looks up how C++ throws when it is loaded itself."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc"))), None)
    if compiler is None:
        return None
    paths = [_found(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    is_there = paths[0] and _found(compiler, "libubsan.so")
    return " ".join(filter(None, paths)) if is_there else None


def _found(compiler: str, name: str) -> str | None:
    asked = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


pytestmark = [
    needs_library,
    pytest.mark.skipif(runtime() is None, reason="no sanitizer runtime"),
    pytest.mark.timeout(600),
]


def compile_with_sanitizers(*names: str, **environment: str) -> None:
    done = run(COMPILE, *names, **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def run_with_sanitizers(
    code: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python and MLX keep what they have until they end, so leaks say nothing."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return run(code, *arguments, LD_PRELOAD=runtime() or "", **options, **environment)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SANITIZED + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def test_neither_real_nor_hostile_calls_are_reported() -> None:
    compile_with_sanitizers("products", "draw", "files")
    done = run_with_sanitizers(RUN_TESTS, *map(str, FILES))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    assert " passed" in done.stdout


@pytest.mark.parametrize("what", PLANTS)
def test_what_is_planted_is_reported(tmp_path: Path, what: str) -> None:
    """Or the test above could not fail."""
    place, planted, report = PLANTS[what]
    folder = tmp_path / "draw"
    shutil.copytree(Path(native.__file__).parent / "draw", folder)
    code = (folder / "draw.c").read_text()
    assert code.count(place) == 1
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    compile_with_sanitizers(str(folder), **cache)
    assert run_with_sanitizers(DRAW, str(folder), **cache).stdout == "drawn 1\n"
    (folder / "draw.c").write_text(code.replace(place, planted))
    compile_with_sanitizers(str(folder), **cache)
    done = run_with_sanitizers(DRAW, str(folder), **cache)
    assert done.returncode != 0
    assert report in done.stderr
    assert "drawn" not in done.stdout
