"""Executes step plans: one forward for all rows, one sampler.

`submit(plan)` gives a handle, whose `collect()` gives the tokens. The host works one step ahead of
the device:

    submit(plan 2)      submits the draw of plan 1's tokens; builds the forward of plan 2, whose
                        decode rows take those tokens as arrays that nobody has read yet
    handle 1.collect()  waits for the tokens of plan 1; does what plan 2 orders for slabs and pool,
                        and submits its forward: the host digests the tokens while that runs

A forward is submitted late, when the one before has ended, because MLX decides at submission
whether a slab can be written in place, and an operation under way still holds the slab: submitted
early, by `submit` already, each step copies all its slabs (docs/adr/0002). Which steps are worth
that, `early` says; it was measured. Where nothing is under way a forward is submitted at once.
Where submitting takes long, tokens that somebody waits for are given before it.

Invariants: everything here runs on the engine's main thread; `_last_tokens[row]` is the token that
a row sampled last; no array of a slab is referenced across steps (see kv_storage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import mlx.core as mx

from mlx_lm_server.core.block import num_common
from mlx_lm_server.core.plan import JoinedRow, RowResult, RowWork, StepPlan, StepResult
from mlx_lm_server.core.submitting import NEVER, EarlySteps
from mlx_lm_server.protocol import Batching, TokenLogprobs
from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.loading import probe
from mlx_lm_server.runner.loading.both_ways import BothWays
from mlx_lm_server.runner.loading.loader import LoadedModel
from mlx_lm_server.runner.loading.measuring import Measurer
from mlx_lm_server.runner.sampling.logprobs import Piece, PromptScores, RowScores
from mlx_lm_server.runner.sampling.row_sampling import RowSampling, start_row
from mlx_lm_server.runner.sampling.sampler import Draw, Sampler
from mlx_lm_server.runner.seam.forwards import SplitForward
from mlx_lm_server.runner.state import kv_quantisation
from mlx_lm_server.runner.state.block_store import BlockStore
from mlx_lm_server.runner.state.kv_storage import RING_SPARE, KVStorage, LayerShape

DEFAULT_BLOCK_SIZE = 16
# Beyond that, tokens that are tried at once are seldom right.
MAX_GUESSES = 32


@dataclass(slots=True)
class _Step:
    """A plan's forward, or what was drawn from it. `works` are those that yield tokens. The result
    is `[positions, vocab]` logits, then `[positions]` tokens; where nothing is sampled, something
    of the forward, only to be waited for; None where a plan has no forward. `beside` is computed
    with it and let go when it has ended."""

    works: tuple[RowWork, ...]
    num_tokens: int = 0
    is_submitted: bool = False
    result: mx.array | None = None
    beside: list[mx.array] = field(default_factory=list)
    draw: Draw | None = None
    scores: RowScores | None = None
    prompts: list[tuple[PromptScores, list[Piece]]] = field(default_factory=list)
    told: dict[int, PromptScores] = field(default_factory=dict)  # by row
    sampling: dict[int, RowSampling] = field(default_factory=dict)  # by row
    vectors: dict[int, mx.array] = field(default_factory=dict)  # by row
    is_drawn: bool = False


class StepHandle:
    """A plan on its way. `collect` is called once, in the order of the plans."""

    def __init__(self, collect: Callable[[], Iterator[StepResult]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[StepResult]:
        """Waits for the plan's forward. Gives what its rows yielded, each row once: as soon as it
        has ended those that somebody waits for, and the others once the next is submitted."""
        return self._collect()


class ModelRunner:
    """One model, the memory of its rows and their sampling state."""

    def __init__(
        self,
        loaded: LoadedModel,
        backend: Backend,
        max_batch_size: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        kv_bits: int | None = 16,
        kv_group_size: int = 64,
    ) -> None:
        """Finds out how the model can be run; see `probe`. Raises UnsupportedModelError where its
        K and V cannot be kept in `kv_bits`; None leaves them as the model makes them."""
        self._loaded = loaded
        self._backend = backend
        self._block_size = block_size
        self._kv_group_size = kv_group_size
        state = loaded.state
        self._choice = probe.choose_forward(loaded.lm, state, loaded.why_no_state, backend)
        self.reason = self._choice.reason
        is_alone = self._choice.batching == "alone"
        layers = [] if is_alone or state is None else state.kv
        self._store(kv_quantisation.quantised(layers, kv_bits, kv_group_size))
        self._sampler = Sampler(loaded.vocab_size, backend)
        self._sampling: dict[int, RowSampling] = {}
        self._sums: dict[int, mx.array] = {}  # of hidden states, of rows that give their mean
        self._last_tokens = mx.zeros((max_batch_size,), mx.int32)
        self._under_way: _Step | None = None
        self._built: _Step | None = None  # after that, submitted or to be
        self.early: EarlySteps = NEVER
        self.policy = backend.policy

    def _store(self, layers: Sequence[LayerShape]) -> None:
        """Makes room, still empty, for K and V of these shapes, and what runs the model over it."""
        self._storage = KVStorage(layers, self._backend)
        self._forward_of = self._choice.over(self._storage)
        probe.check_replays(self._forward_of, self._storage)
        state = self._loaded.state
        per_row = sum(part.nbytes for part in state.recurrent) if state else 0
        self.geometry = replace(self._storage.geometry, bytes_per_row=per_row)
        if self.batching == "alone":
            self.geometry = probe.geometry_of_rows_alone(self._loaded.lm)
        states = self._forward_of.states if isinstance(self._forward_of, SplitForward) else None
        self._blocks = BlockStore(self._storage, states, self._block_size)

    def quantise_kv(self, bits: int) -> bool:
        """Keeps K and V in so many bits, as far as heads allow it; before there is any row. Returns
        whether that takes less memory than before."""
        fewer = kv_quantisation.quantised(self._storage.layers, None, self._kv_group_size, bits)
        if fewer == self._storage.layers:
            return False
        self._store(fewer)
        return True

    @property
    def batching(self) -> Batching:
        return self._forward_of.batching

    @property
    def kv_bits(self) -> int:
        """The fewest of any layer; 16 where none is quantised."""
        return min((layer.kv_bits for layer in self._storage.layers), default=16)

    @property
    def kv_format(self) -> str:
        """In words, what K and V are kept in."""
        names = dict.fromkeys(layer.format for layer in self._storage.layers)
        return " and ".join(names) or str(self._loaded.kv_dtype).removeprefix("mlx.core.")

    @property
    def passes_over_holes(self) -> bool:
        """Whether slots without a row cost attention nothing."""
        return not self._storage.needs_zeros

    @property
    def max_guesses(self) -> int:
        """How many tokens a row can take back: as many guesses may fail at once."""
        if self.batching == "alone" or self.geometry.bytes_per_row:
            return 0
        has_rings = any(layer.ring is not None for layer in self._storage.layers)
        return RING_SPARE if has_rings else MAX_GUESSES

    @property
    def can_pool(self) -> bool:
        """Whether rows can give vectors of their hidden states."""
        return self._loaded.lm.tells_hidden_states

    @property
    def blocks(self) -> BlockStore:
        """Where the bytes of the prefix cache lie."""
        return self._blocks

    def describe(self) -> str:
        """How the model is run, for the log."""
        kinds = ", ".join(self._loaded.state.kinds) if self._loaded.state else "state of its own"
        line = f"{self._loaded.model_type} ({kinds}) runs {self.batching}"
        return f"{line}; {self.reason}" if self.reason else line

    @property
    def kv_held_bytes(self) -> int:
        return self._storage.nbytes

    @property
    def cache_held_bytes(self) -> int:
        """Of blocks and checkpoints."""
        return self._blocks.nbytes

    @property
    def state_held_bytes(self) -> int:
        """Of recurrent state, with `split` forwards."""
        forward = self._forward_of
        return forward.states.nbytes if isinstance(forward, SplitForward) else 0

    @property
    def sampler_held_bytes(self) -> int:
        """Returns what is held for draws, of what they are to know of rows' tokens."""
        return self._sampler.held_bytes

    @property
    def num_layers(self) -> int:
        """Returns how many layers keep K and V in slabs."""
        return len(self._storage.layers)

    def copy_at_most(self, num_bytes: int) -> None:
        """Lets layers be copied at once that have about so much, and at least one."""
        self._storage.max_copied_bytes = num_bytes

    @property
    def can_submit_early(self) -> bool:
        """Returns whether no step needs that the last one has ended: nothing of ours draws in the
        host's memory or writes to slabs unseen, and what steps copy is known."""
        draws = self._sampler.draws_in_host_memory
        return self.batching != "alone" and not draws and not self.passes_over_holes

    def measurer(self, limit_s: float, *, tries_early: bool = False) -> Measurer:
        """Returns what measures forwards; with `tries_early` both ways to submit them, too."""
        both_ways = None
        if tries_early and self.can_submit_early:
            room_bytes = self._loaded.memory_limit_bytes - self._loaded.weights_bytes
            num_rows = self._last_tokens.size
            both_ways = BothWays(self, self._storage, num_rows, room_bytes)
        num_heads = self._loaded.num_heads
        return Measurer(self._forward_of, self._storage, limit_s, num_heads, both_ways)

    # ---- a step

    def submit(self, plan: StepPlan) -> StepHandle:
        """Builds the forward of a plan, and submits it as soon as none is under way, or at once
        where that is better."""
        assert self._built is None, "collect the last plan but one before the next"
        if self._under_way is not None:
            self._draw(self._under_way)
        self._order(plan)
        if self._under_way is None:
            self._storage.stages.start()  # and build the forward meanwhile
        step = self._build(plan) if plan.works else _Step(())
        if self._under_way is None:
            self._start(step)
        else:
            self._built = step
            if self._goes_early(plan, self._under_way):
                self._submit(step)
        return StepHandle(partial(self._collect, step))

    def _order(self, plan: StepPlan) -> None:
        """Prepare what a plan orders for rows, slabs and pool."""
        for save in plan.saves:
            self._blocks.save(save)
        for row in plan.left_rows:
            if (ended := self._sampling.pop(row, None)) is not None:
                self._sampler.let_go(ended)
            self._sums.pop(row, None)
        self._forward_of.forget(plan.left_rows)
        for joined in plan.joined_rows:
            self._join(joined)
        self._storage.apply(*plan.kv_ops)
        for load in plan.loads:
            self._blocks.load(load)

    def _join(self, joined: JoinedRow) -> None:
        self._sampling[joined.row] = start_row(
            joined.sampling, joined.prompt_ids, joined.output_ids, self._loaded.vocab_size
        )

    def _build(self, plan: StepPlan) -> _Step:
        scored = {
            chunk.row: scores
            for chunk in plan.chunks
            if (scores := self._sampling[chunk.row].prompt_scores) is not None
        }
        pooled = [chunk for chunk in plan.chunks if chunk.pooling]
        kept = {*scored, *(chunk.row for chunk in pooled)}
        outcome = self._forward_of.run(plan, self._input_ids(plan), kept)
        step = _Step(plan.sampling, plan.num_tokens, result=outcome.result, beside=outcome.beside)
        for chunk in pooled:
            self._pool(step, chunk, outcome.hidden[chunk.row])
        for chunk in plan.chunks:
            if (scores := scored.get(chunk.row)) is not None:
                head = self._loaded.lm.head
                pieces = scores.take(outcome.hidden[chunk.row], chunk.start, head)
                step.beside += [array for piece in pieces for array in piece]
                step.prompts.append((scores, pieces))
                if chunk.yields:
                    step.told[chunk.row] = scores
                    self._sampling[chunk.row].prompt_scores = None
        return step

    def _pool(self, step: _Step, chunk: RowWork, hidden: mx.array) -> None:
        """Count in the hidden states `[L, 1, dim]` of a chunk, in float32."""
        states = hidden[:, 0].astype(mx.float32)
        vector = states[-1]
        if chunk.pooling == "mean":
            total = states.sum(axis=0)
            if chunk.start:
                total = self._sums[chunk.row] + total
            self._sums[chunk.row] = total
            vector = total / chunk.end
        step.beside.append(vector)
        if chunk.yields:
            step.vectors[chunk.row] = vector

    def _input_ids(self, plan: StepPlan) -> mx.array:
        """The packed token ids `[T]`: of decode rows from the device, of chunks from the plan."""
        parts = []
        if plan.decodes:
            rows = [decode.row for decode in plan.decodes]
            parts.append(self._last_tokens[mx.array(rows, mx.int32)])
        known = [token for chunk in plan.chunks for token in chunk.known_ids]
        if known:
            parts.append(mx.array(known, mx.int32))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _start(self, step: _Step) -> None:
        """Do what the plan orders for slabs and pool, and submit its forward where it is not."""
        self._storage.stages.run()
        if not step.is_submitted:
            self._submit(step)
        self._under_way = step

    def _submit(self, step: _Step) -> None:
        step.is_submitted = True
        if step.result is not None:
            # The last tokens too: who only ever writes to them would hold all that was written.
            mx.async_eval(step.result, *step.beside, self._last_tokens)

    def _goes_early(self, plan: StepPlan, under_way: _Step) -> bool:
        """Returns whether a step is submitted beside the last. What a plan orders for slabs and
        pool is done only when nothing runs."""
        if not plan.works or not self._storage.stages.are_none:
            return False
        slab_bytes = self._storage.slab_bytes({work.slab_id for work in plan.works})
        return self.early.allow(slab_bytes, under_way.num_tokens + plan.num_tokens)

    def _draw(self, step: _Step) -> None:
        """Submit the draw of a token for each position that samples; once."""
        if step.is_drawn:
            return
        step.is_drawn = True
        if not step.works or step.result is None:
            return
        step.sampling = {work.row: self._sampling[work.row] for work in step.works}
        states = [
            state for work in step.works for state in _states(step.sampling[work.row], work.guesses)
        ]
        wanted = [state.params.logprobs for state in states]
        if any(num is not None for num in wanted):
            step.scores = RowScores(step.result, wanted)
        draw = self._sampler.start(step.result, states)
        rows = [work.row for work in step.works if not work.guesses]
        if len(rows) == len(states):
            self._last_tokens[mx.array(rows, mx.int32)] = draw.tokens
        elif rows:
            places = [place for place, work in places_of(step.works) if not work.guesses]
            picked = draw.tokens[mx.array(places, mx.int32)]
            self._last_tokens[mx.array(rows, mx.int32)] = picked
        step.draw, step.result = draw, draw.tokens
        scores = step.scores.take(draw.tokens) if step.scores else ()
        draw.submit(self._last_tokens, *scores)

    def _collect(self, step: _Step) -> Iterator[StepResult]:
        assert step is self._under_way, "plans are collected in their order"
        self._draw(step)
        result = self._read(step)
        self._under_way = None
        following, self._built = self._built, None
        if following is None:
            yield result
            return
        awaited = self._awaited(step, result) if self._submits_slowly else {}
        yield awaited
        self._start(following)
        yield {row: given for row, given in result.items() if row not in awaited}

    def _read(self, step: _Step) -> dict[int, RowResult]:
        """Wait for the forward and what was drawn from it."""
        if step.result is None:
            return {}
        if step.draw is not None:
            step.draw.finish()
        mx.eval(step.result, *step.beside)
        step.beside.clear()
        for prompt, pieces in step.prompts:
            prompt.settle(pieces)
        vectors = {
            row: RowResult((), vector=cast(list[float], vector.tolist()))
            for row, vector in step.vectors.items()
        }
        if not step.works:
            return vectors
        drawn = cast(list[int], step.result.tolist())
        scores = step.scores.read() if step.scores is not None else {}
        return vectors | {
            work.row: self._row_result(step, work, place, drawn, scores)
            for place, work in places_of(step.works)
        }

    def _row_result(
        self,
        step: _Step,
        work: RowWork,
        place: int,
        drawn: Sequence[int],
        scores: Mapping[int, TokenLogprobs],
    ) -> RowResult:
        """What of the tokens from `place` on the row takes, which then goes on behind them."""
        row, num_tokens = step.sampling[work.row], 1
        if work.guesses:
            num_tokens += num_common(work.guesses, drawn[place : place + work.yields])
            row.take(drawn[place : place + num_tokens])
            self._last_tokens[work.row] = drawn[place + num_tokens - 1]
        elif row.follows_tokens:
            row.follow(drawn[place])
        told = step.told.get(work.row)
        places = range(place, place + num_tokens)
        return RowResult(
            token_ids=tuple(drawn[place : place + num_tokens]),
            logprobs=[scores[p] for p in places] if place in scores else None,
            prompt_logprobs=told.read() if told is not None else None,
        )

    def _awaited(self, step: _Step, result: StepResult) -> dict[int, RowResult]:
        """Those that begin or end an answer."""
        found = {}
        for work in step.works:
            given, stops = result[work.row], step.sampling[work.row].params.stop_token_ids
            if work.is_awaited or any(token in stops for token in given.token_ids):
                found[work.row] = given
        return found

    @property
    def _submits_slowly(self) -> bool:
        """Whether submitting takes as long as a forward, or copies much."""
        return self.policy.submits_slowly or not self._storage.stages.are_short


def places_of(works: Iterable[RowWork]) -> Iterator[tuple[int, RowWork]]:
    """Each work with the place of its first position among all that sample."""
    place = 0
    for work in works:
        yield place, work
        place += work.yields


def _states(row: RowSampling, guesses: Sequence[int]) -> list[RowSampling]:
    """Returns the states in which a row draws: its own, or one for each guess more."""
    return row.ahead(guesses) if guesses else [row]
