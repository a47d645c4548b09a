"""What runs the same load in a process of its own: our engine, mlx-lm, and bare loops."""
