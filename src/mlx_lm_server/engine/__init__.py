"""The engine process: one thread that owns mlx, stepping as long as there is work."""
