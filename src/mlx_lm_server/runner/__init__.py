"""All of mlx: loading models, holding KV memory, running forwards, sampling. One thread."""
