"""What every test process needs: the BLAS must be loaded before anything imports mlx, and our
attention must be in place before anything imports a model of mlx-lm."""

from __future__ import annotations

from mlx_lm_server.runner.backends.x86 import blas

blas.preload()

from mlx_lm_server.runner.backends.x86 import fast_math  # noqa: E402
from mlx_lm_server.runner.seam import attention  # noqa: E402

attention.install(use_arithmetic_swiglu=fast_math.is_slow_cpu())
