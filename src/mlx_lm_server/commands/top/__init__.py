"""`mlx-lm-server top`: what a running server does, live."""
