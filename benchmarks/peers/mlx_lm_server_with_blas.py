"""`mlx_lm.server` with OpenBLAS preloaded, as our engine has it but without `small_gemm`.

Takes the arguments of `mlx_lm.server`.
"""

from __future__ import annotations

import sys

from mlx_lm_server.runner.backends import blas


def main() -> None:
    print(f"BLAS: {blas.preload(with_small_gemm=False).name}", file=sys.stderr)
    from mlx_lm.server import main as serve

    serve()


if __name__ == "__main__":
    main()
