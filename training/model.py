"""Qwen3 in PyTorch, just enough of it to train nano on a CPU.

The shapes and parameter names match mlx-lm's `qwen3` model after `export.to_mlx_names`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 decoder; embeddings are tied to the output head."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int = 64
    rope_theta: float = 1e8
    norm_eps: float = 1e-6
    key_bits: int = 0  # while training


VOCAB_SIZE = 3072
NANO = Shape(VOCAB_SIZE, 256, 5, 4, 2, 704)
DRAFT = Shape(VOCAB_SIZE, 128, 2, 2, 1, 640, rope_theta=1e6)
SMOKE = Shape(VOCAB_SIZE, 128, 2, 1, 1, 128)
LONGEST_WRITTEN_OUT = 256
SHAPES = {"nano": NANO, "draft": DRAFT, "smoke": SMOKE}


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle, each `[length, head_dim / 2]`."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to `[batch, heads, length, head_dim]`, halves layout."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, `[batch, heads, length, head_dim]` each.

    Written out for short rows: on a CPU the compiled product beats the fused kernel's backward.
    """
    length = q.shape[2]
    if length > LONGEST_WRITTEN_OUT:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    out: Tensor = scores.masked_fill(hidden, -1e30).softmax(-1).to(v.dtype) @ v
    return out


def rounded(x: Tensor, bits: int) -> Tensor:
    """As a cache in so many bits reads it back; the gradient passes through."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1) + 1e-6
    return x + (((x - low) / step).round() * step + low - x).detach()


class Attention(nn.Module):
    """Causal grouped-query attention with RMS-normed queries and keys.

    With `key_bits` keys are rounded as a quantised cache rounds them, a head at a time.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row; x is `[batch, length, hidden]`."""
        batch, length, _ = x.shape
        dim = self.shape.head_dim
        q = self.q_proj(x).view(batch, length, -1, dim)
        k = self.k_proj(x).view(batch, length, -1, dim)
        v = self.v_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin).to(v.dtype)
        if self.shape.key_bits:
            k = rounded(k, self.shape.key_bits)
        groups = self.shape.num_heads // self.shape.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = attend(q, k, v)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return merged


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, length, hidden]` to the same shape."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `[batch, length, hidden]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The whole model; `forward` gives hidden states, `head` the logits of some of them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, max_length: int = 2048) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Block(shape) for _ in range(shape.num_layers)])
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        cos, sin = rope_tables(max_length, shape.head_dim, shape.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(_init_weights)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[batch, length]` to normed hidden states `[batch, length, hidden]`."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, hidden]` to logits `[n, vocab]`."""
        return functional.linear(hidden, self.embed_tokens.weight)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
