"""Starts a model with a copying circuit, which it would otherwise take millions of tokens to find.

An induction circuit (Elhage et al. 2021, Olsson et al. 2022) has two parts. A head of layer 0 looks
one token back and notes that token's embedding in a reserved part of the residual stream. A head of
layer 1 looks for places whose note matches the current token, and copies the token that stands
there: what followed last time. Training is free to change all of it.

    residual stream   | token embedding          | 1 | note: the token before  |
    dimension         0                     width-65  width-64              width
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Attention, Decoder

CIRCUIT = ("layers.0.self_attn.", "layers.1.self_attn.")
NOTE_DIMS = 64
MATCH_DIMS = 32
FAST_PAIRS = 6  # rotary pairs that tell neighbours apart
SHARPNESS = 4.0
EMBEDDING_STD = 0.1
NOTE_SCALE = 0.15
COPY_SCALE = 0.3


@torch.no_grad()
def install_copy_circuit(model: Decoder) -> None:
    """Write the circuit into the first two layers; uses torch's seeded generator."""
    width = model.shape.hidden_size
    embedding = model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, width - NOTE_DIMS :] = 0
    embedding[:, width - NOTE_DIMS - 1] = EMBEDDING_STD
    first, second = (layer.self_attn for layer in list(model.layers)[:2])
    assert isinstance(first, Attention)
    assert isinstance(second, Attention)
    projection = torch.nn.init.orthogonal_(torch.empty(NOTE_DIMS, width))
    projection[:, width - NOTE_DIMS - 1 :] = 0
    _look_one_back(first, projection)
    _match_and_copy(second, projection)


def _look_one_back(attention: Attention, projection: Tensor) -> None:
    """Head 0 scores a distance d by the sum of cos(angle * (d - 1)): most for the token before."""
    dim, width = attention.shape.head_dim, attention.shape.hidden_size
    pairs = torch.arange(0, FAST_PAIRS)
    angles = attention.shape.rope_theta ** (-2 * pairs / dim)
    constant = width - NOTE_DIMS - 1
    attention.q_proj.weight[:dim] = 0
    attention.k_proj.weight[:dim] = 0
    attention.q_proj.weight[pairs, constant] = angles.cos()
    attention.q_proj.weight[pairs + dim // 2, constant] = -angles.sin()
    attention.k_proj.weight[pairs, constant] = 1.0
    attention.q_norm.weight[pairs] = SHARPNESS
    attention.q_norm.weight[pairs + dim // 2] = SHARPNESS
    attention.v_proj.weight[:dim] = projection
    attention.o_proj.weight[width - NOTE_DIMS :, :dim] = NOTE_SCALE * torch.eye(NOTE_DIMS)


def _match_and_copy(attention: Attention, projection: Tensor) -> None:
    """One head per kv head matches notes in slow rotary pairs and copies a share of the token."""
    shape = attention.shape
    dim, width = shape.head_dim, shape.hidden_size
    slow = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])  # where position hardly turns
    attention.q_norm.weight[slow] = SHARPNESS
    copied = torch.nn.init.orthogonal_(torch.empty(shape.num_kv_heads * dim, width))
    copied[:, width - NOTE_DIMS - 1 :] = 0
    group = shape.num_heads // shape.num_kv_heads
    for kv_head in range(shape.num_kv_heads):
        keys = slice(kv_head * dim, (kv_head + 1) * dim)
        queries = slice(kv_head * group * dim, (kv_head * group + 1) * dim)
        attention.q_proj.weight[queries] = 0
        attention.k_proj.weight[keys] = 0
        reader = torch.zeros(MATCH_DIMS, width)
        reader[:, width - NOTE_DIMS :] = torch.eye(MATCH_DIMS, NOTE_DIMS)
        attention.q_proj.weight[queries.start + slow] = projection[:MATCH_DIMS]
        attention.k_proj.weight[keys.start + slow] = reader
        attention.v_proj.weight[keys] = copied[keys]
        attention.o_proj.weight[:, queries] = COPY_SCALE * copied[keys].T


def hold_circuit(model: Decoder, whole: bool) -> None:
    """Drop gradients: of the notes' place in the embedding always, of the circuit if `whole`."""
    embedding = model.embed_tokens.weight.grad
    if embedding is not None:
        embedding[:, model.shape.hidden_size - NOTE_DIMS - 1 :] = 0
    for name, weight in model.named_parameters():
        if whole and name.startswith(CIRCUIT):
            weight.grad = torch.zeros_like(weight)
