"""Three ways to run a plan through a model. The probe chooses one when the model is loaded.

packed   one forward of all tokens, `[T, 1]`; for models that mix tokens in attention only
split    the decode rows as one forward `[R, 1]`, then each prefill chunk as its own `[1, L]`;
         for recurrent state, and for models that do arithmetic with the K and V they fetch
alone    each row its own forward, with mlx-lm's own caches; for whatever else there is
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_map

from mlx_lm_server.core.plan import RowWork, StepPlan
from mlx_lm_server.protocol import Batching
from mlx_lm_server.runner.backend import AttentionKernel
from mlx_lm_server.runner.seam.attention import LayerCache
from mlx_lm_server.runner.seam.language_model import LanguageModel
from mlx_lm_server.runner.seam.rectangular import ChunkCache, DecodeRowsCache
from mlx_lm_server.runner.seam.replays import MAX_REPLAYED_TOKENS, Replays
from mlx_lm_server.runner.state.cache_kinds import ModelState
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.row_states import RowStates
from mlx_lm_server.runner.state.stages import ends_of
from mlx_lm_server.runner.state.step_layout import StepLayout, layout_of


@dataclass(slots=True)
class Outcome:
    """`result` is `[positions that sample, vocab]` logits, of the works that yield tokens in their
    order, each as many as it yields; anything of the forward where none does;
    `beside` is to be computed with it, such as state that only the next step reads;
    `hidden` are the states `[L, 1, dim]` of the chunks that were asked for, by row."""

    result: mx.array
    beside: list[mx.array] = field(default_factory=list)
    hidden: dict[int, mx.array] = field(default_factory=dict)


class Forward(Protocol):
    """How plans run. `ids` `[T]` are the plan's tokens: of decode rows, then of chunks; `kept`
    are the rows whose chunks' hidden states are wanted, as `LanguageModel.head` takes them."""

    batching: Batching

    def run(self, plan: StepPlan, ids: mx.array, kept: Collection[int] = ()) -> Outcome: ...

    def forget(self, rows: Sequence[int]) -> None:
        """Rows that have left."""


class PackedForward:
    batching: Batching = "packed"

    def __init__(
        self, lm: LanguageModel, state: ModelState, storage: KVStorage, kernel: AttentionKernel
    ) -> None:
        self._lm = lm
        self.storage = storage
        is_in_place = kernel.is_in_place(storage.layers)
        storage.needs_zeros = not is_in_place
        self._layers = [LayerCache(n, storage, kernel) for n in range(len(state.kv))]
        self._caches = state.nest(self._layers, [])
        self._has_rings = any(layer.ring is not None for layer in storage.layers)
        self.replays: Replays | None = None
        if is_in_place:
            self.replays = Replays(lambda *step: self._build(*step)[0], storage)

    def run(self, plan: StepPlan, ids: mx.array, kept: Collection[int] = ()) -> Outcome:
        layout = _layout(plan, self.storage)
        positions = _sampling_positions(plan)
        if self.replays and self._is_replayed(layout, positions) and not kept:
            picked = None if len(positions) == ids.size else mx.array(positions, mx.int32)
            return Outcome(self.replays.run(layout, ids, picked))
        result, hidden = self._build(layout, ids, positions)
        outcome = Outcome(result, self.storage.take_unread())
        end = len(plan.decodes)
        for chunk in plan.chunks:
            begin, end = end, end + chunk.num_tokens
            if chunk.row in kept:
                outcome.hidden[chunk.row] = hidden[begin:end]
        return outcome

    def _is_replayed(self, layout: StepLayout, positions: list[int]) -> bool:
        """Where chunks go in rings is part of the graph."""
        has_ring_chunks = self._has_rings and bool(layout.chunks)
        return bool(positions) and layout.num_tokens <= MAX_REPLAYED_TOKENS and not has_ring_chunks

    def _build(
        self, layout: StepLayout, ids: mx.array, positions: list[int] | mx.array | None
    ) -> tuple[mx.array, mx.array]:
        with _begun(self._layers, layout):
            return self._lm.run(ids[:, None], self._caches, positions)

    def forget(self, rows: Sequence[int]) -> None:
        """All of a row lies in its slab."""


class SplitForward:
    batching: Batching = "split"

    def __init__(
        self,
        lm: LanguageModel,
        state: ModelState,
        storage: KVStorage,
        kernel: AttentionKernel,
        fetched_mask_dims: int | None = None,
    ) -> None:
        """Decode rows attend slab by slab and chunks where their K and V lie; or K and V are
        fetched for them, with a mask of so many dimensions."""
        self._lm = lm
        self._state = state
        self._storage = storage
        attends = fetched_mask_dims is None
        storage.needs_zeros = not (attends and kernel.is_in_place(storage.layers))
        layers = range(len(state.kv))
        self._row_layers: list[Any] = [
            LayerCache(n, storage, kernel)
            if fetched_mask_dims is None
            else DecodeRowsCache(n, storage, fetched_mask_dims)
            for n in layers
        ]
        self._chunk_layers = [ChunkCache(n, storage, kernel, attends=attends) for n in layers]
        self.states = RowStates(state.recurrent)

    def run(self, plan: StepPlan, ids: mx.array, kept: Collection[int] = ()) -> Outcome:
        results: list[mx.array] = []
        beside: list[mx.array] = []
        hidden: dict[int, mx.array] = {}
        end = len(plan.decodes)
        if plan.decodes:
            results.append(self._run_decodes(plan.decodes, ids[:end, None]))
        for chunk in plan.chunks:
            begin, end = end, end + chunk.num_tokens
            outputs, states = self._run_chunk(chunk, ids[None, begin:end])
            (results if chunk.num_sampled else beside).append(outputs)
            if chunk.row in kept:
                hidden[chunk.row] = states.swapaxes(0, 1)
        beside += ends_of(self.states.arrays) + self._storage.take_unread()
        if not results:
            results.append(beside.pop(0))
        return Outcome(_joined(results), beside, hidden)

    def forget(self, rows: Sequence[int]) -> None:
        self.states.drop(rows)

    def _run_decodes(self, decodes: tuple[RowWork, ...], ids: mx.array) -> mx.array:
        plan = StepPlan(0, decodes=decodes)
        layout = _layout(plan, self._storage)
        rows = [decode.row for decode in decodes]
        caches = self._state.nest(self._row_layers, self.states.take(rows))
        with _begun(self._row_layers, layout):
            logits = self._lm(ids, caches)
        self.states.put(rows, self._state.recurrent_of(caches))
        return logits

    def _run_chunk(self, chunk: RowWork, ids: mx.array) -> tuple[mx.array, mx.array]:
        states = self.states.take([chunk.row]) if chunk.start else self.states.fresh()
        caches = self._state.nest(self._chunk_layers, states)
        with _begun(self._chunk_layers, chunk):
            outputs = self._lm.run(ids, caches, _last_positions(chunk))
        self.states.put([chunk.row], self._state.recurrent_of(caches))
        return outputs


class AloneForward:
    batching: Batching = "alone"

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._caches: dict[int, list[Any]] = {}

    def run(self, plan: StepPlan, ids: mx.array, kept: Collection[int] = ()) -> Outcome:
        results: list[mx.array] = []
        beside: list[mx.array] = []
        hidden: dict[int, mx.array] = {}
        for number, decode in enumerate(plan.decodes):
            one = ids[None, number : number + 1]
            results.append(self._lm(one, self._caches[decode.row]))
        end = len(plan.decodes)
        for chunk in plan.chunks:
            begin, end = end, end + chunk.num_tokens
            outputs, states = self._run_chunk(chunk, ids[None, begin:end])
            (results if chunk.num_sampled else beside).append(outputs)
            if chunk.row in kept:
                hidden[chunk.row] = states.swapaxes(0, 1)
        for row in {work.row for work in plan.works}:
            beside += ends_of(arrays_of(self._caches[row]))
        if not results:
            results.append(beside.pop(0))
        return Outcome(_joined(results), beside, hidden)

    def _run_chunk(self, chunk: RowWork, ids: mx.array) -> tuple[mx.array, mx.array]:
        from mlx_lm.models.cache import make_prompt_cache

        if chunk.start == 0:
            self._caches[chunk.row] = make_prompt_cache(self._lm.model)
        return self._lm.run(ids, self._caches[chunk.row], _last_positions(chunk))

    def forget(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._caches.pop(row, None)


def _joined(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


def arrays_of(caches: Sequence[Any]) -> list[mx.array]:
    """All arrays that mlx-lm's caches hold."""
    found: list[mx.array] = []
    tree_map(
        lambda leaf: found.append(leaf) if isinstance(leaf, mx.array) else None,
        [cache.state for cache in caches],
    )
    return found


class _begun:
    """A forward's caches between their `begin` and their `end`."""

    def __init__(self, caches: Sequence[Any], what: StepLayout | RowWork) -> None:
        self._caches = caches
        for cache in caches:
            cache.begin(what)

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for cache in self._caches:
            if error is None:
                cache.write_unattended()
            cache.end()


def _layout(plan: StepPlan, storage: KVStorage) -> StepLayout:
    capacities = {slab_id: slab.capacity for slab_id, slab in storage.slabs.items()}
    return layout_of(plan, capacities, storage.backend.policy.length_step)


def _sampling_positions(plan: StepPlan) -> list[int]:
    """Where, among the packed tokens, the rows that sample do so."""
    positions = list(range(len(plan.decodes)))
    end = len(plan.decodes)
    for chunk in plan.chunks:
        end += chunk.num_tokens
        positions += range(end - chunk.num_sampled, end)
    return positions


def _last_positions(chunk: RowWork) -> list[int]:
    """Where, among its own tokens, a chunk samples."""
    return list(range(chunk.num_tokens - chunk.num_sampled, chunk.num_tokens))


Candidate = Callable[[KVStorage], Forward]
