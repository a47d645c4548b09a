"""What the core decides and the runner executes: one frozen StepPlan per step.

The KV memory of all rows lives in *slabs*: per layer and per K or V one array
`[num_slots, kv_heads, capacity, head_dim]`. A row sits in one slot of one slab:

    slab 3, capacity 256     slot 0   ████████████░░░░     row 7, 190 tokens
                             slot 1   ██████████████░░     row 2, 230 tokens
                             slot 2   (free)

Slots in use are the first ones of their slab, but for holes where attention passes over them
(kv_layout.py).

Blocks of tokens that no row holds any more lie in the *pool*, in segments: per layer and per K or V
one array `[num_blocks, kv_heads, block_size, head_dim]`. Checkpoints of state that is not kept by
token (recurrent state, windows) lie beside them, one by one.

A row goes on from where its work says: a `start` before the end of what the row holds takes the
tokens from there on back. Layers with a window allow that for `RING_SPARE` tokens
(runner/state/kv_storage.py); recurrent state has to be saved before such tokens and loaded after
them. A row that runs alone gives nothing back.

A plan consists of values only: it can be sent to other processes, which execute it with shards of
the same model (`encode_plan`, `decode_plan`). What the tier holds is therefore named, never
carried.

All operations of a plan are executed before its forward, in this order: `saves` (what rows leave
behind, from where they lay until now; what goes to the tier and comes from it), `kv_ops` (slabs and
slots), `loads` (what rows need not compute).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.tier import Label
from mlx_lm_server.protocol import SamplingParams, TokenLogprobs


class Operation(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of what the core orders to be done to slabs, pool and rows."""


class CreateSlab(Operation, frozen=True):
    slab_id: int
    num_slots: int
    capacity: int


class ResizeSlab(Operation, frozen=True):
    """Give the slab another number of slots; the content of the slots that stay is kept."""

    slab_id: int
    num_slots: int


class DropSlab(Operation, frozen=True):
    slab_id: int


class MoveRow(Operation, frozen=True):
    """Copy the first `num_tokens` tokens of a slot to a slot of the same or another slab."""

    from_slab: int
    from_slot: int
    to_slab: int
    to_slot: int
    num_tokens: int


KVOp = CreateSlab | ResizeSlab | DropSlab | MoveRow


class CreateSegment(Operation, frozen=True):
    segment_id: int
    num_blocks: int


class DropSegment(Operation, frozen=True):
    segment_id: int


class MoveBlocks(Operation, frozen=True):
    """Copy blocks within the pool, from places to other places."""

    moves: tuple[tuple[Place, Place], ...]


PoolOp = CreateSegment | DropSegment | MoveBlocks


class SaveBlocks(Operation, frozen=True):
    """Copy blocks of a slot to the pool: `places[i]` gets block `first_block + i` of the slot.
    Only `num_tokens` tokens of the slot are filled; the last block may end there."""

    slab_id: int
    slot: int
    first_block: int
    num_tokens: int
    places: tuple[Place, ...]


class SaveState(Operation, frozen=True):
    """Keep the state of a row, which has seen `num_tokens` tokens, as `state_id`."""

    state_id: int
    row: int
    slab_id: int
    slot: int
    num_tokens: int


class DropState(Operation, frozen=True):
    state_id: int


class OffloadBlocks(Operation, frozen=True):
    """Give the tier copies of blocks in the pool."""

    places: tuple[Place, ...]
    labels: tuple[Label, ...]


class OffloadTokens(Operation, frozen=True):
    """Give the tier copies of full blocks in slots of a slab: of `slots[i]` that which is block
    number `numbers[i]` of its row."""

    slab_id: int
    slots: tuple[int, ...]
    numbers: tuple[int, ...]
    labels: tuple[Label, ...]


class OffloadState(Operation, frozen=True):
    """Give the tier a copy of a kept state."""

    state_id: int
    label: Label


class RestoreBlocks(Operation, frozen=True):
    """Put records that came back from the tier, by their names, in the pool."""

    places: tuple[Place, ...]
    names: tuple[bytes, ...]


class RestoreState(Operation, frozen=True):
    """Keep the record of this name, which came back from the tier, as `state_id`: the state after
    `num_tokens` tokens."""

    state_id: int
    num_tokens: int
    name: bytes


TierOp = OffloadBlocks | OffloadTokens | OffloadState | RestoreBlocks | RestoreState
SaveOp = PoolOp | SaveBlocks | SaveState | DropState | TierOp


class LoadBlocks(Operation, frozen=True):
    """Tokens `start` to `stop - 1` of a slot come from the pool; the first of `places` holds the
    block that token `start` is in."""

    slab_id: int
    slot: int
    start: int
    stop: int
    places: tuple[Place, ...]


class CopyTokens(Operation, frozen=True):
    """Tokens `start` to `stop - 1` of a slot come from the same places of another slot."""

    from_slab: int
    from_slot: int
    to_slab: int
    to_slot: int
    start: int
    stop: int


class LoadState(Operation, frozen=True):
    """The row begins with a kept state, taken after `num_tokens` tokens."""

    state_id: int
    row: int
    slab_id: int
    slot: int
    num_tokens: int


LoadOp = LoadBlocks | CopyTokens | LoadState


class JoinedRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that gets row number `row` with this plan (first admission or after preemption).

    `output_ids` are the tokens it had sampled before it was preempted; the draw of the next token
    and the penalties go on from there.
    """

    req_id: str
    row: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: SamplingParams


# Which hidden state of a text stands for it: that of its last token, or the mean of all.
Pooling = Literal["last", "mean"]


class RowWork(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one row computes in a forward: tokens at positions `start`, `start + 1`, …

    `token_ids` None stands for the one token that the row sampled last, which may still be on the
    device only; known ones are a chunk of a prompt, or the last token and guesses of what follows.

        yields   0       nothing: a chunk before the end of what is known
                 1       the token after the last position
                 1 + k   the last k ids are guesses, tried against what the row draws there: as many
                         tokens as guesses were right, and one more

    With `pooling` a row yields no tokens: its work gives one vector of its hidden states at the end
    of its text (1), and before that is only counted in (0). Such a row computes all its tokens.

    `is_awaited` says that somebody waits for the token more than for the next, since an answer
    begins or is known to end with it.
    """

    row: int
    slab_id: int
    slot: int
    start: int
    token_ids: tuple[int, ...] | None = None
    yields: int = 1
    is_awaited: bool = False
    pooling: Pooling | None = None

    @property
    def num_sampled(self) -> int:
        """How many of its last positions sample."""
        return 0 if self.pooling else self.yields

    @property
    def num_tokens(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Returns the ids of work whose tokens the host knows."""
        assert self.token_ids is not None, "its token is pending"
        return self.token_ids

    @property
    def guesses(self) -> tuple[int, ...]:
        """Returns the ids that are only tried."""
        return self.known_ids[1 - self.yields :] if self.yields > 1 else ()


class StepPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One forward. `decodes` are the rows whose token is pending, `chunks` those with known ids,
    each ordered by (slab_id, slot); the forward packs them in this order."""

    step: int
    left_rows: tuple[int, ...] = ()
    joined_rows: tuple[JoinedRow, ...] = ()
    kv_ops: tuple[KVOp, ...] = ()
    decodes: tuple[RowWork, ...] = ()
    chunks: tuple[RowWork, ...] = ()
    saves: tuple[SaveOp, ...] = ()
    loads: tuple[LoadOp, ...] = ()

    @property
    def works(self) -> tuple[RowWork, ...]:
        return (*self.decodes, *self.chunks)

    @property
    def num_chunk_tokens(self) -> int:
        return sum(work.num_tokens for work in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward computes."""
        return self.num_chunk_tokens + len(self.decodes)

    @property
    def num_copied_tokens(self) -> int:
        """Tokens whose K and V rows are given before the forward: from the cache, or in a larger
        slot."""
        loaded = (op.stop - op.start for op in self.loads if not isinstance(op, LoadState))
        moved = (op.num_tokens for op in self.kv_ops if isinstance(op, MoveRow))
        return sum(loaded) + sum(moved)

    @property
    def takes_memory(self) -> bool:
        """Whether arrays are made that stay."""
        made = CreateSlab | ResizeSlab | CreateSegment
        return any(isinstance(op, made) for op in (*self.kv_ops, *self.saves))

    @property
    def sampling(self) -> tuple[RowWork, ...]:
        """Returns the works that yield tokens, in the order in which the forward packs them."""
        return tuple(work for work in self.works if work.num_sampled)


def encode_plan(plan: StepPlan) -> bytes:
    """Returns the plan as msgpack."""
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> StepPlan:
    """Returns the plan that `encode_plan` wrote. Raises msgspec.DecodeError."""
    return _decoder.decode(data)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepPlan)


class RowResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a row's work yielded: its tokens, and where they were asked for logprobs of each, and
    with its first token those of its prompt from the second token on; or a vector `[dim]`."""

    token_ids: tuple[int, ...]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    vector: list[float] | None = None


# By row; rows whose work yields nothing are not in it.
StepResult = Mapping[int, RowResult]
