"""What mlx-lm's models see in place of their caches, and how a plan runs through them."""
