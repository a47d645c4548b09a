"""Executes step plans: one forward for all rows, one sampler.

The host works one step ahead of the device:

    sample()      submits the draw of a token for each sampling row of the forward that runs
    execute(plan) builds the graph of the next forward, whose decode rows take those tokens as
                  arrays that nobody has read yet
    read()        waits for the tokens, submits that graph at once, and returns the tokens, so that
                  the host digests them while the device runs

The graph is submitted only when the forward before has ended, because MLX decides at submission
whether a slab can be written in place, and an operation under way still holds the slab: submitted
earlier, each step copied all slabs (docs/adr/0002).

Invariants: everything here runs on the engine's main thread; `_last_tokens[row]` is the token that
a row sampled last; no array of a slab is referenced across steps (see kv_storage).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.plan import (
    CreateSlab,
    DecodeRow,
    DropSlab,
    JoinedRow,
    PrefillChunk,
    RowLogprobs,
    StepPlan,
)
from mlx_lm_server.errors import UnsupportedModelError
from mlx_lm_server.runner.attention import CpuKernel, LayerCache, choose_kernel
from mlx_lm_server.runner.kv_storage import KVStorage
from mlx_lm_server.runner.loader import LoadedModel
from mlx_lm_server.runner.logprobs import PromptScores, RowScores
from mlx_lm_server.runner.sampler import RowSampling, Sampler, start_row
from mlx_lm_server.runner.step_layout import layout_of

PROBE_SLAB = -1
PROBE_TOKENS = 12
CALIBRATION_TOKENS = 64
CALIBRATION_CONTEXT = 1024


@dataclass(slots=True)
class _Forward:
    """A forward, or what was drawn from it. The result is `[len(rows), vocab]` logits, then
    `[len(rows)]` tokens; hidden states where no row samples, only to be waited for."""

    result: mx.array
    rows: tuple[int, ...]
    scores: RowScores | None = None
    prompts: list[PromptScores] = field(default_factory=list)
    beside: list[mx.array] = field(default_factory=list)  # computed with the forward
    told: dict[int, PromptScores] = field(default_factory=dict)  # by place among `rows`


class ModelRunner:
    """One model, the KV memory of its rows and their sampling state."""

    def __init__(self, loaded: LoadedModel, max_batch_size: int) -> None:
        self._loaded = loaded
        self._storage = KVStorage(loaded.layers, loaded.kv_dtype)
        kernel = choose_kernel(loaded.kv_dtype)
        self._needs_bias = isinstance(kernel, CpuKernel)
        self._caches = [
            LayerCache(number, self._storage, kernel) for number in range(len(loaded.layers))
        ]
        self._sampler = Sampler(loaded.vocab_size)
        self._sampling: dict[int, RowSampling] = {}
        self._last_tokens = mx.zeros((max_batch_size,), mx.int32)
        self._forward: _Forward | None = None
        self._drawn: _Forward | None = None
        self._scores: dict[int, RowLogprobs] = {}

    @property
    def kv_bytes_per_token(self) -> int:
        return self._storage.bytes_per_token

    @property
    def kv_held_bytes(self) -> int:
        return self._storage.nbytes

    # ---- a step

    def execute(self, plan: StepPlan) -> None:
        """Build the forward of a plan. The one before must have been sampled."""
        assert self._forward is None, "sample the last forward before the next one"
        for row in plan.left_rows:
            self._sampling.pop(row, None)
        for joined in plan.joined_rows:
            self._join(joined)
        for op in plan.kv_ops:
            self._storage.apply(op)
        if plan.decodes or plan.prefills:
            self._forward = self._build(plan)

    def _join(self, joined: JoinedRow) -> None:
        self._sampling[joined.row] = start_row(
            joined.sampling, joined.prompt_ids, joined.output_ids, self._loaded.vocab_size
        )

    def _build(self, plan: StepPlan) -> _Forward:
        hidden = result = self._hidden(plan, self._input_ids(plan))
        picked = _sampling_positions(plan)
        if 0 < len(picked) < result.shape[0]:
            result = result[mx.array(picked, mx.int32)]
        if picked:
            result = self._loaded.head(result[:, 0])
        forward = _Forward(result, plan.sampling_rows)
        self._score_prompts(plan, hidden, forward)
        return forward

    def _score_prompts(self, plan: StepPlan, hidden: mx.array, forward: _Forward) -> None:
        """For the chunks of rows that want the logprobs of their prompt."""
        end = len(plan.decodes)
        for chunk in plan.prefills:
            begin, end = end, end + len(chunk.token_ids)
            scores = self._sampling[chunk.row].prompt_scores
            if scores is None:
                continue
            forward.beside += scores.take(hidden[begin:end], chunk.start, self._loaded.head)
            forward.prompts.append(scores)
            if chunk.samples:
                forward.told[plan.sampling_rows.index(chunk.row)] = scores

    def _hidden(self, plan: StepPlan, ids: mx.array) -> mx.array:
        """Hidden states of the packed tokens, `[T, 1, hidden]`."""
        capacities = {slab_id: slab.capacity for slab_id, slab in self._storage.slabs.items()}
        layout = layout_of(plan, capacities, self._needs_bias)
        for cache in self._caches:
            cache.begin(layout)
        return self._loaded.backbone(ids[:, None], self._caches)

    def _input_ids(self, plan: StepPlan) -> mx.array:
        """The packed token ids `[T]`: of decode rows from the device, of chunks from the plan."""
        parts = []
        if plan.decodes:
            rows = [decode.row for decode in plan.decodes]
            parts.append(self._last_tokens[mx.array(rows, mx.int32)])
        known = [token for chunk in plan.prefills for token in chunk.token_ids]
        if known:
            parts.append(mx.array(known, mx.int32))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def sample(self) -> None:
        """Submit the draw for the forward executed last, if there is one."""
        assert self._drawn is None, "read the last tokens before the next ones are drawn"
        self._drawn, self._forward = self._forward, None
        if self._drawn is None or not self._drawn.rows:
            return
        logits, rows = self._drawn.result, self._drawn.rows
        sampling = [self._sampling[row] for row in rows]
        wanted = [row.params.logprobs for row in sampling]
        if any(num is not None for num in wanted):
            self._drawn.scores = RowScores(logits, wanted)
        tokens = self._sampler.sample(logits, sampling)
        self._last_tokens[mx.array(rows, mx.int32)] = tokens
        self._drawn.result = tokens
        scores = self._drawn.scores.take(tokens) if self._drawn.scores else ()
        mx.async_eval(tokens, self._last_tokens, *scores)

    def read(self) -> list[int]:
        """Wait for the forward that `sample` took, submit the one that `execute` built, and give
        the tokens in the order of their plan's sampling rows."""
        drawn, self._drawn = self._drawn, None
        self._scores = {}
        if drawn is not None:
            mx.eval(drawn.result, *drawn.beside)
            self._scores = _read_scores(drawn)
        if self._forward is not None:
            mx.async_eval(self._forward.result, *self._forward.beside)
        if drawn is None or not drawn.rows:
            return []
        return drawn.result.tolist()  # type: ignore[return-value]

    def read_logprobs(self) -> dict[int, RowLogprobs]:
        """With the tokens read last, by their place among them, where they were asked for."""
        return self._scores

    # ---- at start

    def probe(self) -> None:
        """Compare packed tokens with mlx-lm's own forward; raises UnsupportedModelError where they
        differ. A chunk, another row's chunk and decode rows share forwards, as when serving."""
        from mlx_lm.models.cache import make_prompt_cache

        ids = [(7 * i + 3) % self._loaded.vocab_size for i in range(PROBE_TOKENS)]
        model = self._loaded.model
        expected = model(mx.array([ids]), cache=make_prompt_cache(model))[0].astype(mx.float32)
        actual = mx.concatenate(self._probe_packed(ids)).astype(mx.float32)
        spread = float(mx.max(mx.abs(expected)))
        error = float(mx.max(mx.abs(expected - actual)))
        tolerance = 1e-4 if self._loaded.kv_dtype == mx.float32 else 0.06
        if not error <= tolerance * max(1.0, spread):
            raise UnsupportedModelError(
                f"{self._loaded.model_type}: packed tokens give other logits than mlx-lm's forward "
                f"(largest difference {error:.3g} of {spread:.3g})"
            )

    def _probe_packed(self, ids: Sequence[int]) -> list[mx.array]:
        """Logits of all positions: half of the ids as a chunk, then one by one beside a chunk."""
        half = len(ids) // 2
        logits = []
        with self._scratch_slab(num_slots=2, capacity=len(ids)):
            plans = [_plan(prefills=[_chunk(0, 0, ids[:half])])]
            plans += [
                _plan([_decode(0, position)], [_chunk(1, position - half, ids[:1])])
                for position in range(half, len(ids))
            ]
            for plan in plans:
                chunk_ids = [t for c in plan.prefills for t in c.token_ids]
                decode_ids = [ids[d.position] for d in plan.decodes]
                hidden = self._hidden(plan, mx.array(decode_ids + chunk_ids, mx.int32))
                num_compared = len(plan.decodes) or half
                logits.append(self._loaded.head(hidden[:num_compared, 0]))
                mx.eval(logits[-1])
        return logits

    def calibrate(self) -> StepCosts:
        """First costs for the cost model, measured: a decode row, two sizes of chunk, and a chunk
        far from the start."""
        size, far = CALIBRATION_TOKENS, CALIBRATION_CONTEXT
        with self._scratch_slab(num_slots=1, capacity=far + size):
            one_s = self._time(_plan([_decode(0, 0)]))
            small_s = self._time(_plan(prefills=[_chunk(0, 0, [1] * size)]))
            large_s = self._time(_plan(prefills=[_chunk(0, 0, [1] * 4 * size)]))
            far_s = self._time(_plan(prefills=[_chunk(0, far, [1] * size)]))
        per_token_s = max(1e-7, (large_s - small_s) / (3 * size))
        per_pair_s = max(per_token_s / 1e5, (far_s - small_s) / (size * far))
        return StepCosts(
            base_s=max(1e-5, one_s - per_token_s),
            per_prefill_token_s=per_token_s,
            per_row_s=per_token_s,
            per_kv_token_s=per_pair_s,
            per_prefill_pair_s=per_pair_s,
        )

    def time_chunk(self) -> float:
        """Seconds of a prefill chunk, the fastest of some."""
        size = 4 * CALIBRATION_TOKENS
        with self._scratch_slab(num_slots=1, capacity=size):
            return self._time(_plan(prefills=[_chunk(0, 0, [1] * size)]), repeats=3)

    def activation_bytes_per_token(self) -> int:
        """Peak memory of a forward beyond what it holds, per token, measured with one chunk."""
        size = 4 * CALIBRATION_TOKENS
        with self._scratch_slab(num_slots=1, capacity=size):
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            self._time(_plan(prefills=[_chunk(0, 0, [1] * size)]), repeats=1)
            return max(1, (mx.get_peak_memory() - before) // size)

    def _time(self, plan: StepPlan, repeats: int = 2) -> float:
        """Seconds of the fastest of some forwards of a scratch plan."""
        num_ids = len(plan.decodes) + plan.num_prefill_tokens
        best_s = float("inf")
        for _ in range(repeats):
            begun = time.perf_counter()
            hidden = self._hidden(plan, mx.ones((num_ids,), mx.int32))
            mx.eval(self._loaded.head(hidden[-1:, 0]))
            best_s = min(best_s, time.perf_counter() - begun)
        return best_s

    def _scratch_slab(self, num_slots: int, capacity: int) -> _ScratchSlab:
        return _ScratchSlab(self._storage, num_slots, capacity)


class _ScratchSlab:
    """A slab for the time of a `with`."""

    def __init__(self, storage: KVStorage, num_slots: int, capacity: int) -> None:
        self._storage = storage
        self._create = CreateSlab(PROBE_SLAB, num_slots, capacity)

    def __enter__(self) -> None:
        self._storage.apply(self._create)

    def __exit__(self, *_exc: object) -> None:
        self._storage.apply(DropSlab(PROBE_SLAB))


def _plan(decodes: Sequence[DecodeRow] = (), prefills: Sequence[PrefillChunk] = ()) -> StepPlan:
    return StepPlan(0, (), (), (), tuple(decodes), tuple(prefills))


def _decode(slot: int, position: int) -> DecodeRow:
    return DecodeRow(slot, PROBE_SLAB, slot, position)


def _chunk(slot: int, start: int, ids: Sequence[int]) -> PrefillChunk:
    return PrefillChunk(slot, PROBE_SLAB, slot, start, tuple(ids), samples=True)


def _read_scores(drawn: _Forward) -> dict[int, RowLogprobs]:
    for prompt in drawn.prompts:
        prompt.settle()
    tokens = drawn.scores.read() if drawn.scores is not None else {}
    prompts = {place: scores.read() for place, scores in drawn.told.items()}
    return {
        place: RowLogprobs(tokens.get(place), prompts.get(place))
        for place in tokens.keys() | prompts.keys()
    }


def _sampling_positions(plan: StepPlan) -> list[int]:
    """Where, among the packed tokens, the rows that sample have their last one."""
    positions = list(range(len(plan.decodes)))
    end = len(plan.decodes)
    for chunk in plan.prefills:
        end += len(chunk.token_ids)
        if chunk.samples:
            positions.append(end - 1)
    return positions
