"""From a model folder to a model that runs: read, compared with mlx-lm, measured."""
