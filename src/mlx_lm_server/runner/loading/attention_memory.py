"""What attention takes for a moment beyond K and V: scores, where no fused kernel computes them,
and numbers that are read from few bits."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_lm_server.runner.backend import AttentionKernel
from mlx_lm_server.runner.state.kv_storage import LayerShape

# A chunk of so few tokens over a context whose scores outweigh all else of attention.
CHUNK_TOKENS, CONTEXT_TOKENS = 16, 4096


def bytes_per_pair(kernel: AttentionKernel, layers: Sequence[LayerShape], num_heads: int) -> float:
    """Returns what the peak of attention has for each pair of a token and one that it attends to,
    of the layer that takes most; those with a window attend to few."""
    if kernel.is_in_place(layers):
        return 0.0
    shapes = {
        (shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype)
        for shape in layers
        if shape.window is None
    }
    return max((_peak_of(kernel, num_heads, *shape) for shape in shapes), default=0.0)


def bytes_per_read_token(layers: Sequence[LayerShape]) -> int:
    """Returns what K and V of a token take as numbers, of the quantised layer that takes most."""
    return max(
        (
            shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype.size
            for shape in layers
            if shape.quantisation is not None
        ),
        default=0,
    )


def _peak_of(
    kernel: AttentionKernel,
    num_heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: mx.Dtype,
) -> float:
    heads = max(1, num_heads // kv_heads) * kv_heads
    q = mx.zeros((heads, CHUNK_TOKENS, key_dim), dtype)
    k, v = (mx.zeros((kv_heads, CONTEXT_TOKENS, dim), dtype) for dim in (key_dim, value_dim))
    mx.eval(q, k, v)
    held_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    out = kernel.chunk(q, k, v, 1.0, CONTEXT_TOKENS - CHUNK_TOKENS)
    mx.eval(out)
    more_bytes = mx.get_peak_memory() - held_bytes - out.nbytes
    return max(0.0, more_bytes / (CHUNK_TOKENS * CONTEXT_TOKENS))
