"""The back end that tests use: the machine's own, or the one of `MLX_LM_SERVER_WAY`."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any, cast

import pytest

from mlx_lm_server import platform
from mlx_lm_server.config import Way
from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.backends.choose import choose
from mlx_lm_server.runner.backends.fused import FusedBackend

WAY = cast("Way | None", os.environ.get("MLX_LM_SERVER_WAY") or None)
# What is measured without a device says nothing. With `early` all tests of a way are its tests.
SUBMISSION = os.environ.get("MLX_LM_SERVER_SUBMISSION") or "late"
BACKEND = choose(WAY)
IS_X86 = BACKEND.policy.way == "x86"

has_native = (
    IS_X86
    and platform.is_linux()
    and shutil.which("cc") is not None
    and {"avx2", "fma"} <= platform.cpu_flags()
)
needs_native = pytest.mark.skipif(
    not has_native, reason="needs a C compiler, a CPU with AVX2, and the x86 way"
)
only_x86 = pytest.mark.skipif(not IS_X86, reason="is about the x86 way")


def with_policy(**changes: Any) -> Backend:
    """Returns a back end of the same way with another policy."""
    assert isinstance(BACKEND, FusedBackend)
    return type(BACKEND)(replace(BACKEND.policy, **changes))
