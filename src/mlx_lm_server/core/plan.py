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

A row goes on from where its work says: a `position` or `start` before the end of what the row holds
takes the tokens from there on back. Layers with a window allow that for `RING_SPARE` tokens
(runner/kv_storage.py); recurrent state has to be saved before such tokens and loaded after them. A
row that runs alone gives nothing back.

All operations of a plan are executed before its forward, in this order: `saves` (what rows leave
behind, from where they lay until now; what goes to the tier and comes from it), `kv_ops` (slabs and
slots), `loads` (what rows need not compute).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.tier import Label, Payload
from mlx_lm_server.protocol import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class CreateSlab:
    slab_id: int
    num_slots: int
    capacity: int


@dataclass(frozen=True, slots=True)
class ResizeSlab:
    """Give the slab another number of slots; the content of the slots that stay is kept."""

    slab_id: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class DropSlab:
    slab_id: int


@dataclass(frozen=True, slots=True)
class MoveRow:
    """Copy the first `num_tokens` tokens of a slot to a slot of the same or another slab."""

    from_slab: int
    from_slot: int
    to_slab: int
    to_slot: int
    num_tokens: int


KVOp = CreateSlab | ResizeSlab | DropSlab | MoveRow


@dataclass(frozen=True, slots=True)
class CreateSegment:
    segment_id: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class DropSegment:
    segment_id: int


@dataclass(frozen=True, slots=True)
class MoveBlocks:
    """Copy blocks within the pool, from places to other places."""

    moves: tuple[tuple[Place, Place], ...]


PoolOp = CreateSegment | DropSegment | MoveBlocks


@dataclass(frozen=True, slots=True)
class SaveBlocks:
    """Copy blocks of a slot to the pool: `places[i]` gets block `first_block + i` of the slot.
    Only `num_tokens` tokens of the slot are filled; the last block may end there."""

    slab_id: int
    slot: int
    first_block: int
    num_tokens: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class SaveState:
    """Keep the state of a row, which has seen `num_tokens` tokens, as `state_id`."""

    state_id: int
    row: int
    slab_id: int
    slot: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DropState:
    state_id: int


@dataclass(frozen=True, slots=True)
class OffloadBlocks:
    """Give the tier copies of blocks in the pool."""

    places: tuple[Place, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class OffloadTokens:
    """Give the tier copies of full blocks in slots of a slab: of `slots[i]` that which is block
    number `numbers[i]` of its row."""

    slab_id: int
    slots: tuple[int, ...]
    numbers: tuple[int, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class OffloadState:
    """Give the tier a copy of a kept state."""

    state_id: int
    label: Label


@dataclass(frozen=True, slots=True)
class RestoreBlocks:
    """Put what came back from the tier in the pool."""

    places: tuple[Place, ...]
    payloads: tuple[Payload, ...]


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Keep what came back from the tier as `state_id`: the state after `num_tokens` tokens."""

    state_id: int
    num_tokens: int
    payload: Payload


TierOp = OffloadBlocks | OffloadTokens | OffloadState | RestoreBlocks | RestoreState
SaveOp = PoolOp | SaveBlocks | SaveState | DropState | TierOp


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Tokens `start` to `stop - 1` of a slot come from the pool; the first of `places` holds the
    block that token `start` is in."""

    slab_id: int
    slot: int
    start: int
    stop: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class CopyTokens:
    """Tokens `start` to `stop - 1` of a slot come from the same places of another slot."""

    from_slab: int
    from_slot: int
    to_slab: int
    to_slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LoadState:
    """The row begins with a kept state, taken after `num_tokens` tokens."""

    state_id: int
    row: int
    slab_id: int
    slot: int
    num_tokens: int


LoadOp = LoadBlocks | CopyTokens | LoadState


@dataclass(frozen=True, slots=True)
class JoinedRow:
    """A request that gets row number `row` with this plan (first admission or after preemption).

    `output_ids` are the tokens it had sampled before it was preempted; the draw of the next token
    and the penalties go on from there.
    """

    req_id: str
    row: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token of a row: the one it sampled last, which may still be on the device only.

    `position` is where its K and V go, which is also how many tokens the row holds before.
    """

    row: int
    slab_id: int
    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Known tokens of a row, written at `start`, `start + 1`, …

    `samples` is true where the chunk ends the row's known tokens, so that its last position gives
    the next token.
    """

    row: int
    slab_id: int
    slot: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward. `decodes` are ordered by (slab_id, slot). Rows that sample, in the order in
    which the runner returns their tokens: every decode, then the prefills with `samples`."""

    step: int
    left_rows: tuple[int, ...]
    joined_rows: tuple[JoinedRow, ...]
    kv_ops: tuple[KVOp, ...]
    decodes: tuple[DecodeRow, ...]
    prefills: tuple[PrefillChunk, ...]
    saves: tuple[SaveOp, ...] = ()
    loads: tuple[LoadOp, ...] = ()

    @property
    def num_prefill_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward computes."""
        return self.num_prefill_tokens + len(self.decodes)

    @property
    def num_copied_tokens(self) -> int:
        """Whose K and V rows are given before the forward: from the cache, or in a larger slot."""
        loaded = (op.stop - op.start for op in self.loads if not isinstance(op, LoadState))
        moved = (op.num_tokens for op in self.kv_ops if isinstance(op, MoveRow))
        return sum(loaded) + sum(moved)

    @property
    def takes_memory(self) -> bool:
        """Whether arrays are made that stay."""
        made = CreateSlab | ResizeSlab | CreateSegment
        return any(isinstance(op, made) for op in (*self.kv_ops, *self.saves))

    @property
    def sampling_rows(self) -> tuple[int, ...]:
        return tuple(d.row for d in self.decodes) + tuple(p.row for p in self.prefills if p.samples)


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """What a row that asked for logprobs gets with a token: the token's, and with its first token
    those of its prompt from the second token on."""

    token: TokenLogprobs | None
    prompt: list[TokenLogprobs] | None = None
