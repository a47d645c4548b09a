"""Logprobs of drawn tokens and of prompts, for the rows that asked for them.

They are the model's own: of the logits before penalties, bias and temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_lm_server.protocol import TokenLogprobs

HEAD_TOKENS = 64

# Of some tokens of a prompt: logprobs, ids and logprobs of the likeliest, ranks.
Piece = tuple[mx.array, ...]


class RowScores:
    """Of one step. Made before the draw, since the draw may change the logits."""

    def __init__(self, logits: mx.array, wanted: Sequence[int | None]) -> None:
        """`logits` is `[n, vocab]`; `wanted[i]` how many alternatives row i names, None for no
        logprobs at all."""
        self._rows = [i for i, num in enumerate(wanted) if num is not None]
        self._num_top = [num for num in wanted if num is not None]
        picked = logits
        if len(self._rows) < len(wanted):
            picked = logits[mx.array(self._rows, mx.int32)]
        self._logits = picked.astype(mx.float32)
        self._arrays: list[mx.array] = []

    def take(self, tokens: mx.array) -> list[mx.array]:
        """Score the drawn tokens `[n]`; the arrays to be computed."""
        drawn = tokens[mx.array(self._rows, mx.int32)][:, None]
        self._arrays = list(score(self._logits, drawn, max(self._num_top)))
        return self._arrays

    def read(self) -> dict[int, TokenLogprobs]:
        """By row; waits for the arrays."""
        own, ids, tops = (cast(list[Any], array.tolist()) for array in self._arrays)
        found = zip(self._rows, self._num_top, own, ids, tops, strict=True)
        return {row: TokenLogprobs(o[0], i[:num], t[:num]) for row, num, o, i, t in found}


class PromptScores:
    """Of the prompt of one row, chunk by chunk. The head is computed in pieces, since a chunk's
    logits would be larger than everything else."""

    def __init__(self, prompt_ids: Sequence[int], num_top: int) -> None:
        self._prompt_ids = tuple(prompt_ids)
        self._num_top = num_top
        self._found: list[TokenLogprobs] = []

    def take(
        self, hidden: mx.array, start: int, head: Callable[[mx.array], mx.array]
    ) -> list[Piece]:
        """Scores hidden states `[n, 1, dim]` of the prompt's tokens from `start` on, each of which
        foretells the next one. Returns what is to be computed, and then to be settled."""
        pieces: list[Piece] = []
        last = min(start + hidden.shape[0], len(self._prompt_ids) - 1)
        for first in range(start, last, HEAD_TOKENS):
            following = self._prompt_ids[first + 1 : min(first + HEAD_TOKENS, last) + 1]
            place = first - start
            logits = head(hidden[place : place + len(following), 0]).astype(mx.float32)
            tokens = mx.array(following, mx.int32)[:, None]
            own = mx.take_along_axis(logits, tokens, axis=-1)
            rank = (logits > own).sum(axis=-1) + 1
            pieces.append((*score(logits, tokens, self._num_top), rank))
        return pieces

    def settle(self, pieces: Sequence[Piece]) -> None:
        """Keeps the numbers of pieces that are computed; those of a later chunk may be on their
        way already, and must not be touched before its forward is submitted."""
        for piece in pieces:
            own, ids, tops, ranks = (cast(list[Any], array.tolist()) for array in piece)
            found = zip(own, ids, tops, ranks, strict=True)
            self._found += [TokenLogprobs(o[0], i, t, rank) for o, i, t, rank in found]

    def read(self) -> list[TokenLogprobs]:
        return self._found


def score(logits: mx.array, tokens: mx.array, num_top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Logits `[n, vocab]` and tokens `[n, 1]` → logprobs `[n, 1]`, and ids and logprobs
    `[n, num_top]` of the likeliest tokens, the likeliest first."""
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, tokens, axis=-1) - total
    if num_top == 0:
        empty = mx.zeros((logits.shape[0], 0))
        return own, empty.astype(mx.int32), empty
    ids = mx.argpartition(-logits, num_top - 1, axis=-1)[:, :num_top]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    return own, ids, mx.take_along_axis(values, order, axis=-1) - total
