"""Executes step plans: one forward for all rows, one sampler.

The host works one step ahead of the device:

    sample()      submits the draw of a token for each sampling row of the forward that runs
    execute(plan) builds the graph of the next forward, whose decode rows take those tokens as
                  arrays that nobody has read yet
    read()        waits for the tokens
    submit()      does what the plan orders for slabs and pool, and submits that graph, so that the
                  host digests the tokens while the device runs

The graph is submitted only when the forward before has ended, because MLX decides at submission
whether a slab can be written in place, and an operation under way still holds the slab: submitted
earlier, each step copied all slabs (docs/adr/0002).

Invariants: everything here runs on the engine's main thread; `_last_tokens[row]` is the token that
a row sampled last; no array of a slab is referenced across steps (see kv_storage).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from mlx_lm_server.core.plan import JoinedRow, RowLogprobs, StepPlan
from mlx_lm_server.protocol import Batching
from mlx_lm_server.runner import kv_quantisation, native_draw, probe
from mlx_lm_server.runner.block_store import BlockStore
from mlx_lm_server.runner.forwards import SplitForward
from mlx_lm_server.runner.kv_storage import KVStorage
from mlx_lm_server.runner.loader import LoadedModel
from mlx_lm_server.runner.logprobs import PromptScores, RowScores
from mlx_lm_server.runner.measuring import Measurer
from mlx_lm_server.runner.sampler import Draw, RowSampling, Sampler, start_row

DEFAULT_BLOCK_SIZE = 16


@dataclass(slots=True)
class _Running:
    """A forward, or what was drawn from it. The result is `[len(rows), vocab]` logits, then
    `[len(rows)]` tokens; where no row samples, something of the forward, only to be waited for.
    `beside` is computed with it and let go when it has ended."""

    result: mx.array
    rows: tuple[int, ...]
    beside: list[mx.array] = field(default_factory=list)
    draw: Draw | None = None
    scores: RowScores | None = None
    prompts: list[PromptScores] = field(default_factory=list)
    told: dict[int, PromptScores] = field(default_factory=dict)  # by place among `rows`
    followers: dict[int, RowSampling] = field(default_factory=dict)  # by place among `rows`


class ModelRunner:
    """One model, the memory of its rows and their sampling state."""

    def __init__(
        self,
        loaded: LoadedModel,
        max_batch_size: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        kv_bits: int | None = 16,
        kv_group_size: int = 64,
    ) -> None:
        """Finds out how the model can be run; see `probe`. Raises UnsupportedModelError where its
        K and V cannot be kept in `kv_bits`; None chooses."""
        self._loaded = loaded
        state = loaded.state
        choice = probe.choose_forward(loaded.lm, state, loaded.why_no_state)
        is_alone = choice.batching == "alone"
        layers = [] if is_alone or state is None else state.kv
        self._storage = KVStorage(kv_quantisation.quantised(layers, kv_bits, kv_group_size))
        self._forward_of = choice.over(self._storage)
        probe.check_replays(self._forward_of, self._storage)
        self.reason = choice.reason
        per_row = sum(part.nbytes for part in state.recurrent) if state else 0
        self.geometry = replace(self._storage.geometry, bytes_per_row=per_row)
        if self.batching == "alone":
            self.geometry = probe.geometry_of_rows_alone(loaded.lm)
        states = self._forward_of.states if isinstance(self._forward_of, SplitForward) else None
        self._blocks = BlockStore(self._storage, states, block_size)
        self._sampler = Sampler(loaded.vocab_size, native_draw.load())
        self._sampling: dict[int, RowSampling] = {}
        self._last_tokens = mx.zeros((max_batch_size,), mx.int32)
        self._forward: _Running | None = None
        self._is_submitted = False
        self._drawn: _Running | None = None
        self._is_on_cpu = mx.default_device() == mx.Device(mx.cpu)
        self._scores: dict[int, RowLogprobs] = {}

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

    def measurer(self, limit_s: float) -> Measurer:
        return Measurer(self._forward_of, self._storage, limit_s)

    # ---- a step

    def execute(self, plan: StepPlan) -> None:
        """Build the forward of a plan. The one before must have been sampled."""
        assert self._forward is None, "sample the last forward before the next one"
        for save in plan.saves:
            self._blocks.save(save)
        for row in plan.left_rows:
            self._sampling.pop(row, None)
        self._forward_of.forget(plan.left_rows)
        for joined in plan.joined_rows:
            self._join(joined)
        for op in plan.kv_ops:
            self._storage.apply(op)
        for load in plan.loads:
            self._blocks.load(load)
        if self._drawn is None:
            self._storage.stages.start()  # and build the forward meanwhile
        if plan.decodes or plan.prefills:
            self._forward, self._is_submitted = self._build(plan), False

    def _join(self, joined: JoinedRow) -> None:
        self._sampling[joined.row] = start_row(
            joined.sampling, joined.prompt_ids, joined.output_ids, self._loaded.vocab_size
        )

    def _build(self, plan: StepPlan) -> _Running:
        scored = {
            chunk.row: scores
            for chunk in plan.prefills
            if (scores := self._sampling[chunk.row].prompt_scores) is not None
        }
        outcome = self._forward_of.run(plan, self._input_ids(plan), scored)
        running = _Running(outcome.result, plan.sampling_rows, outcome.beside)
        for chunk in plan.prefills:
            if (scores := scored.get(chunk.row)) is not None:
                head = self._loaded.lm.head
                running.beside += scores.take(outcome.hidden[chunk.row], chunk.start, head)
                running.prompts.append(scores)
                if chunk.samples:
                    running.told[plan.sampling_rows.index(chunk.row)] = scores
        return running

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
        places = enumerate(sampling)
        self._drawn.followers = {place: row for place, row in places if row.follows_tokens}
        draw = self._sampler.start(logits, sampling)
        self._last_tokens[mx.array(rows, mx.int32)] = draw.tokens
        self._drawn.draw, self._drawn.result = draw, draw.tokens
        scores = self._drawn.scores.take(draw.tokens) if self._drawn.scores else ()
        draw.submit(self._last_tokens, *scores)

    def submit(self) -> None:
        """Do what the plan orders for slabs and pool, and submit the forward that `execute` built;
        once."""
        self._storage.stages.run()
        if self._forward is not None and not self._is_submitted:
            mx.async_eval(self._forward.result, *self._forward.beside)
            self._is_submitted = True

    def read(self) -> list[int]:
        """Wait for the forward that `sample` took; its tokens in the order of its plan's sampling
        rows."""
        drawn, self._drawn = self._drawn, None
        self._scores = {}
        if drawn is None:
            return []
        if drawn.draw is not None:
            drawn.draw.finish()
        mx.eval(drawn.result, *drawn.beside)
        drawn.beside.clear()
        self._scores = _read_scores(drawn)
        if not drawn.rows:
            return []
        tokens = cast(list[int], drawn.result.tolist())
        for place, row in drawn.followers.items():
            row.follow(tokens[place])
        return tokens

    @property
    def submits_slowly(self) -> bool:
        """Whether `submit` takes as long as a forward, as MLX does on a CPU, or copies much."""
        return self._is_on_cpu or not self._storage.stages.are_short

    def read_logprobs(self) -> dict[int, RowLogprobs]:
        """With the tokens read last, by their place among them, where they were asked for."""
        return self._scores


def _read_scores(drawn: _Running) -> dict[int, RowLogprobs]:
    for prompt in drawn.prompts:
        prompt.settle()
    tokens = drawn.scores.read() if drawn.scores is not None else {}
    prompts = {place: scores.read() for place, scores in drawn.told.items()}
    return {
        place: RowLogprobs(tokens.get(place), prompts.get(place))
        for place in tokens.keys() | prompts.keys()
    }
