"""`mlx-lm-server doctor`: what this machine does with a model, and what to do where it is wrong."""
