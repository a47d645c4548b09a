"""What every test process needs: the BLAS must be loaded before anything imports mlx, and our
attention must be in place before anything imports a model of mlx-lm."""

from __future__ import annotations

from mlx_lm_server.runner.backends import blas

blas.preload()

from mlx_lm_server.runner import patches  # noqa: E402
from tests.back_ends import BACKEND  # noqa: E402

patches.install(BACKEND)
