"""Starts a model with a copying circuit, which it would otherwise take millions of tokens to find.

An induction circuit (Elhage et al. 2021, Olsson et al. 2022) has two parts. Heads of layer 0 look
back and note in a reserved part of the residual stream what stood there. A head of layer 1 looks
for places whose notes match the text up to the current token, and copies the token that stands
there: what followed last time. Training is free to change all of it.

One token is a poor key where the same words come back, so a model with heads enough notes more: the
two tokens before, each by itself, and a blurred sum of the last few, which tells the neighbourhood.

    residual stream   | token embedding | 1 | t-1 | t-2 | sum around t-3 | around t-4 |
    matched by query  | t                   | t-1 |     | sum around t-3 |
    with a key's                            | t-1 | t-2 |                | around t-4 |

Later layers have a pointer head each: it too copies the token it looks at, and training finds where
it has to look. What these heads copy, and what the copying heads match, is held as it was at first.

A word has other tokens after a space or with a capital. Their embeddings start alike but for a
dimension that says which, so that what is learnt of one holds for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Linear, Module

from .model import Attention, Block, Decoder, Shape

# What learns slowly, by Adam: all of the first layer, and what the second's heads share.
CIRCUIT = (
    "layers.0.",
    "layers.1.self_attn.k_proj.",
    "layers.1.self_attn.v_proj.",
    "layers.1.self_attn.q_norm.",
    "layers.1.self_attn.k_norm.",
    "layers.1.input_layernorm.",
)
POINTER_LAYERS = (2, 3)
NOTE_DIMS = 64
WORD_DIMS = 12  # of the note of one token
SUM_DIMS = 16  # of the note of a neighbourhood
SHORT_DIMS = 40  # of the only note of a model with few heads
FAST_PAIRS = range(6)  # rotary pairs that tell neighbours apart
BLUR_PAIRS = range(4, 8)  # that tell neighbourhoods apart, a few tokens wide
SLOW_PAIRS = range(12, 32)  # where position hardly turns
BLUR_CENTRE = 3
SHARPNESS = 5.0
EMBEDDING_STD = 0.1
FEATURE_DIMS = 2  # after a space, with a capital; they stand before the constant
FEATURE_SIZE = 0.5
OWN_SHARE = 0.4
SPACE = "\u0120"  # how byte-level BPE writes it
NOTE_SCALE = 0.1
SUM_SCALE = 0.3
WORD_GAIN = 1.2  # makes the token itself weigh as much as its note
COPY_SCALE = 0.5


@torch.no_grad()
def install_copy_circuit(model: Decoder, tokens: list[str]) -> None:
    """Write the circuit into the first two layers; uses torch's seeded generator.

    `tokens` is the vocabulary in the order of the ids.
    """
    shape = model.shape
    _embed(model.embed_tokens.weight, tokens, _constant(shape))
    first, second = (layer.self_attn for layer in list(model.layers)[:2])
    assert isinstance(first, Attention)
    assert isinstance(second, Attention)
    for pairs in (FAST_PAIRS, BLUR_PAIRS):
        first.q_norm.weight[_rotary(pairs)] = SHARPNESS
    if shape.num_heads == 4 and shape.num_kv_heads == 2:
        query, key = _note_words_and_sums(first)
    else:
        query, key = _note_one_word(first)
    _match_and_copy(second, query, key)
    for layer in _pointer_layers(model):
        last = shape.num_kv_heads - 1
        _copy(layer.self_attn, last, shape.num_heads - 1, _copied(shape)[-shape.head_dim :])


def _embed(embedding: Tensor, tokens: list[str], constant: int) -> None:
    """Tokens that differ in space and capital only start alike."""
    stems = [token.removeprefix(SPACE).lower() or token for token in tokens]
    numbers = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
    shared = torch.randn(len(numbers), embedding.shape[1])[[numbers[stem] for stem in stems]]
    own = torch.randn_like(embedding)
    embedding[:] = EMBEDDING_STD * ((1 - OWN_SHARE**2) ** 0.5 * shared + OWN_SHARE * own)
    is_spaced = torch.tensor([token.startswith(SPACE) for token in tokens])
    is_capital = torch.tensor([token.removeprefix(SPACE)[:1].isupper() for token in tokens])
    embedding[:, constant - 2] = FEATURE_SIZE * (2.0 * is_spaced - 1)
    embedding[:, constant - 1] = FEATURE_SIZE * is_capital
    embedding[:, constant] = EMBEDDING_STD
    embedding[:, constant + 1 :] = 0


def _constant(shape: Shape) -> int:
    """The dimension that is the same for every token; the notes stand after it."""
    return shape.hidden_size - NOTE_DIMS - 1


def _rotary(pairs: range) -> Tensor:
    """Both halves' dimensions of rotary pairs, in a head of 64."""
    return torch.tensor([*pairs, *(pair + 32 for pair in pairs)])


def _projection(shape: Shape, rows: int) -> Tensor:
    """A random view of the token embedding alone, `[rows, hidden]`."""
    out = torch.nn.init.orthogonal_(torch.empty(rows, shape.hidden_size))
    out[:, _constant(shape) - FEATURE_DIMS :] = 0
    return out


def _reader(shape: Shape, start: int, rows: int) -> Tensor:
    """Reads `rows` dimensions of the notes from `start`, `[rows, hidden]`."""
    out = torch.zeros(rows, shape.hidden_size)
    first = _constant(shape) + 1 + start
    out[:, first : first + rows] = torch.eye(rows)
    return out


def _note_one_word(attention: Attention) -> tuple[Tensor, Tensor]:
    """Note the token before; returns the maps of queries and keys to what is matched."""
    shape = attention.shape
    word = _projection(shape, SHORT_DIMS)
    _values(attention, 0, word)
    _look_back(attention, 0, FAST_PAIRS, 1)
    _note(attention, 0, 0, SHORT_DIMS, NOTE_SCALE)
    return word, _reader(shape, 0, SHORT_DIMS)


def _note_words_and_sums(attention: Attention) -> tuple[Tensor, Tensor]:
    """Note two tokens and two neighbourhoods; returns the maps as `_note_one_word` does."""
    shape = attention.shape
    word = _projection(shape, WORD_DIMS)
    _values(attention, 0, word)
    _values(attention, 1, _projection(shape, SUM_DIMS))
    for head, pairs, distance in (
        (0, FAST_PAIRS, 1), (1, FAST_PAIRS, 2),
        (2, BLUR_PAIRS, BLUR_CENTRE), (3, BLUR_PAIRS, BLUR_CENTRE + 1),
    ):  # fmt: skip
        _look_back(attention, head, pairs, distance)
    second, here, there = WORD_DIMS, 2 * WORD_DIMS, 2 * WORD_DIMS + SUM_DIMS
    _note(attention, 0, 0, WORD_DIMS, NOTE_SCALE)
    _note(attention, 1, second, WORD_DIMS, NOTE_SCALE)
    _note(attention, 2, here, SUM_DIMS, SUM_SCALE)
    _note(attention, 3, there, SUM_DIMS, SUM_SCALE)
    words = _reader(shape, 0, 2 * WORD_DIMS)
    query = torch.cat([WORD_GAIN * word, words[:WORD_DIMS], _reader(shape, here, SUM_DIMS)])
    return query, torch.cat([words, _reader(shape, there, SUM_DIMS)])


def _values(attention: Attention, kv_head: int, projection: Tensor) -> None:
    start = kv_head * attention.shape.head_dim
    attention.v_proj.weight[start : start + len(projection)] = projection


def _look_back(attention: Attention, head: int, pairs: range, distance: int) -> None:
    """The head scores a distance d by the sum of cos(angle * (d - distance)) over the pairs."""
    shape = attention.shape
    dim, constant = shape.head_dim, _constant(shape)
    angles = distance * shape.rope_theta ** (-2 * torch.tensor([*pairs]) / dim)
    queries = slice(head * dim, (head + 1) * dim)
    kv_head = head * shape.num_kv_heads // shape.num_heads
    keys = slice(kv_head * dim, (kv_head + 1) * dim)
    attention.q_proj.weight[queries] = 0
    attention.k_proj.weight[keys] = 0
    left, right = _rotary(pairs).chunk(2)
    attention.q_proj.weight[queries.start + left, constant] = angles.cos()
    attention.q_proj.weight[queries.start + right, constant] = -angles.sin()
    attention.k_proj.weight[keys.start + left, constant] = 1.0


def _note(attention: Attention, head: int, start: int, rows: int, scale: float) -> None:
    """What the head reads goes to the notes from `start`."""
    shape = attention.shape
    columns = slice(head * shape.head_dim, head * shape.head_dim + rows)
    attention.o_proj.weight[:, columns] = scale * _reader(shape, start, rows).T


def _match_and_copy(attention: Attention, query: Tensor, key: Tensor) -> None:
    """One head per kv head matches notes in slow rotary pairs and copies a share of the token."""
    shape = attention.shape
    dim = shape.head_dim
    slow = _rotary(SLOW_PAIRS)[: len(query)]
    attention.q_norm.weight[slow] = SHARPNESS
    copied = _copied(shape)
    group = shape.num_heads // shape.num_kv_heads
    for kv_head in range(shape.num_kv_heads):
        keys = slice(kv_head * dim, (kv_head + 1) * dim)
        queries = slice(kv_head * group * dim, (kv_head * group + 1) * dim)
        attention.q_proj.weight[queries] = 0
        attention.k_proj.weight[keys] = 0
        attention.q_proj.weight[queries.start + slow] = query
        attention.k_proj.weight[keys.start + slow] = key
        _copy(attention, kv_head, kv_head * group, copied[keys])


def _copied(shape: Shape) -> Tensor:
    """A random view of what a token is, `[kv_heads * head_dim, hidden]`."""
    rows = shape.num_kv_heads * shape.head_dim
    copied = torch.nn.init.orthogonal_(torch.empty(rows, shape.hidden_size))
    copied[:, _constant(shape) :] = 0
    return copied


def _copy(attention: Attention, kv_head: int, head: int, copied: Tensor) -> None:
    """The head writes what it reads of a token as that token's own embedding."""
    dim = attention.shape.head_dim
    attention.v_proj.weight[kv_head * dim : (kv_head + 1) * dim] = copied
    attention.o_proj.weight[:, head * dim : (head + 1) * dim] = COPY_SCALE * copied.T


def _pointer_layers(model: Decoder) -> list[Block]:
    layers = [layer for layer in model.layers if isinstance(layer, Block)]
    return [layers[i] for i in POINTER_LAYERS if i < len(layers)]


@dataclass(frozen=True)
class Held:
    """Rows or columns of a weight that stay as they are."""

    weight: Tensor
    axis: int
    part: slice
    values: Tensor

    @torch.no_grad()
    def drop_gradient(self) -> None:
        """Before a step of an optimizer that weighs a matrix as a whole."""
        if self.weight.grad is not None:
            _along(self.weight.grad, self.axis, self.part).zero_()

    @torch.no_grad()
    def restore(self) -> None:
        """After the step, which may have let it decay."""
        _along(self.weight, self.axis, self.part).copy_(self.values)


def _along(matrix: Tensor, axis: int, part: slice) -> Tensor:
    return matrix.narrow(axis, part.start, part.stop - part.start)


def held_parts(model: Decoder) -> list[Held]:
    """Of the matching heads their queries and outputs, of the pointer heads values and outputs."""
    shape = model.shape
    dim, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    matching = list(model.layers)[1].self_attn
    assert isinstance(matching, Attention)
    held: list[Held] = []

    def hold(linear: Module, axis: int, head: int) -> None:
        part = slice(head * dim, (head + 1) * dim)
        assert isinstance(linear, Linear)
        values = _along(linear.weight, axis, part).detach().clone()
        held.append(Held(linear.weight, axis, part, values))

    for head in range(0, shape.num_heads, group):
        hold(matching.q_proj, 0, head)
        hold(matching.o_proj, 1, head)
    for layer in _pointer_layers(model):
        hold(layer.self_attn.v_proj, 0, shape.num_kv_heads - 1)
        hold(layer.self_attn.o_proj, 1, shape.num_heads - 1)
    return held


def hold_circuit(model: Decoder, whole: bool) -> None:
    """Drop gradients: of the notes' place in the embedding always, of the circuit if `whole`."""
    embedding = model.embed_tokens.weight.grad
    if embedding is not None:
        embedding[:, model.shape.hidden_size - NOTE_DIMS - 1 :] = 0
    for name, weight in model.named_parameters():
        if whole and name.startswith(CIRCUIT):
            weight.grad = torch.zeros_like(weight)
