"""Makes a model that runs of a model folder: read, compared with mlx-lm, measured."""
