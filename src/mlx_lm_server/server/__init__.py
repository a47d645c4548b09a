"""The server process: HTTP in front, engines behind. It never imports mlx."""
