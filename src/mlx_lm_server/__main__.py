"""`python -m mlx_lm_server` is `mlx-lm-server`."""

from mlx_lm_server.cli import main

if __name__ == "__main__":
    main()
