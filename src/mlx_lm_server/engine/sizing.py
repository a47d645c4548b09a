"""How large things are made, from what was measured and what the memory holds."""

from __future__ import annotations

from dataclasses import replace

from mlx_lm_server.core.block_pool import DEFAULT_SEGMENT_BYTES
from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import MemoryLedger
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.core.slab_rules import MAX_SLABS, SlabRules
from mlx_lm_server.core.submitting import NEVER, WORTH_IT, EarlySteps, early_steps
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.backend import MemoryPlan, Policy
from mlx_lm_server.runner.loading.loader import LoadedModel
from mlx_lm_server.runner.model_runner import ModelRunner

# With nobody decoding, a step takes about so long: a request that arrives waits for its end.
IDLE_STEP_S = 0.5
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 256, 2048
MIN_KV_TOKENS = 1024
# Rows of one capacity share slabs of up to so much, and each slab is one attention call a layer.
MIN_SLAB_BYTES = 64 * 1024 * 1024
SLABS_IN_MEMORY = 8
# Of what weights leave, the part that may be copied at once.
MOVED_PART = 32
# A row gets room for so many tokens of its answer at once, where that takes no more than a share of
# the memory in all rows.
MIN_LOOKAHEAD, MAX_LOOKAHEAD = 256, 1024
MAX_LOOKAHEAD_SHARE = 0.25
# Logits and the sampler's arrays of the same size, in float32, per row that samples
# (tests/mlx/test_sampler_kernels.py).
SAMPLER_ARRAYS = 8
# Scores of chunks, where attention computes such, may take a share of what weights leave, or as
# much as full steps over short contexts do.
SCORES_SHARE, LEAST_SCORED_CONTEXT = 0.05, 512


def context_tokens(order: LoadModel, loaded: LoadedModel) -> int:
    """Returns how long a row can become: the model's context, or the operator's cap."""
    return min(loaded.context_tokens, order.max_kv_tokens or loaded.context_tokens)


class Sizes:
    """Says what of the memory goes where."""

    def __init__(
        self, order: LoadModel, loaded: LoadedModel, runner: ModelRunner, measured: Measured
    ) -> None:
        self._order = order
        self._loaded = loaded
        self._runner = runner
        self._policy: Policy = runner.policy
        self._copy_bytes_per_s = measured.copy_bytes_per_s
        geometry = runner.geometry
        rows = order.max_batch_size
        self._max_step_tokens = order.max_num_batched_tokens or max(
            _affordable_tokens(measured.costs), rows
        )
        ledger = MemoryLedger(
            memory_limit_bytes=loaded.memory_limit_bytes,
            weights_bytes=loaded.weights_bytes,
            forward=measured.forward_bytes,
            max_step_tokens=self._max_step_tokens,
            geometry=geometry,
            max_kv_tokens=order.max_kv_tokens,
            reserve_bytes=rows * loaded.vocab_size * 4 * SAMPLER_ARRAYS
            + rows * geometry.bytes_per_row  # states before and after a step
            + self._moved_bytes,
            max_rows=rows,
            max_read_tokens=context_tokens(order, loaded),
            max_step_pairs=self._max_step_pairs(measured.forward_bytes.per_pair),
        )
        self.early = self._early_steps(ledger, measured)
        reserve_bytes = ledger.reserve_bytes + self.early.reserve_bytes
        self.ledger = replace(ledger, reserve_bytes=reserve_bytes)

    @property
    def _free_bytes(self) -> int:
        """Returns what weights leave."""
        return max(0, self._loaded.memory_limit_bytes - self._loaded.weights_bytes)

    @property
    def max_copied_bytes(self) -> int:
        """Returns how much of several layers may be copied at once."""
        return min(self._policy.max_copied_bytes, self._free_bytes // MOVED_PART)

    @property
    def _moved_bytes(self) -> int:
        """Returns what layers of slabs take that are moved at once: as many as may be copied
        together, and at least one of the largest slab."""
        of_layer = self._free_bytes // SLABS_IN_MEMORY // max(1, self._runner.num_layers)
        return max(of_layer, self.max_copied_bytes)

    def _max_step_pairs(self, pair_bytes: float) -> int:
        """Returns to how many tokens those of a step's chunks attend together: as far as scores
        take a small share of what weights leave, else chunks far from the start are smaller."""
        context = context_tokens(self._order, self._loaded)
        affordable = int(SCORES_SHARE * self._free_bytes / max(pair_bytes, 1e-9))
        least = self._max_step_tokens * min(context, LEAST_SCORED_CONTEXT)
        return min(self._max_step_tokens * context, max(least, affordable))

    @property
    def hold_context(self) -> bool:
        """Returns whether a row as long as it can become fits, if it is alone."""
        return self.ledger.kv_limit_tokens >= context_tokens(self._order, self._loaded)

    def check(self) -> None:
        """Raises ModelTooLargeError where there is no room for rows."""
        most = self._order.max_kv_tokens or MIN_KV_TOKENS
        self.ledger.check_model_fits(min(MIN_KV_TOKENS, most))

    def memory_plan(self) -> MemoryPlan:
        """Returns what MLX and the system are told of all that."""
        ledger = self.ledger
        return MemoryPlan(
            limit_bytes=ledger.memory_limit_bytes,
            held_bytes=ledger.weights_bytes + ledger.kv_limit_bytes,
            step_bytes=ledger.step_bytes,
        )

    def _early_steps(self, ledger: MemoryLedger, measured: Measured) -> EarlySteps:
        """Which steps are submitted before the last has ended: besides slabs they hold two steps'
        states and logits."""
        submitting = measured.submitting
        if self._order.submission == "early" and self._runner.can_submit_early:
            submitting = WORTH_IT
        if submitting is None or self._order.submission == "late":
            return NEVER
        row_bytes = ledger.geometry.bytes_per_row + self._loaded.vocab_size * 4
        other_bytes = ledger.max_rows * row_bytes
        return early_steps(submitting, other_bytes, ledger.free_bytes, ledger.max_step_tokens)

    def layout(self) -> KVLayout:
        """Returns the layout of rows, in which there is none yet."""
        limit_bytes = self.ledger.kv_limit_bytes
        return KVLayout(
            geometry=self._runner.geometry,
            limit_bytes=limit_bytes,
            rules=SlabRules(
                max_slab_bytes=max(MIN_SLAB_BYTES, limit_bytes // SLABS_IN_MEMORY),
                max_resized_bytes=self._policy.max_resized_bytes,
                keeps_holes=self._runner.passes_over_holes,
                capacity_step=self._policy.capacity_step,
                max_slabs=None if self._runner.passes_over_holes else MAX_SLABS,
            ),
            max_rows=self._order.max_batch_size,
            max_tokens=self.ledger.kv_limit_tokens,
        )

    def limits(self) -> SchedulerLimits:
        """Returns what bounds a step."""
        order = self._order
        kv_tokens = self.ledger.kv_limit_bytes // max(1, self._runner.geometry.bytes_per_token)
        lookahead = int(MAX_LOOKAHEAD_SHARE * kv_tokens) // order.max_batch_size
        return SchedulerLimits(
            max_batch_size=order.max_batch_size,
            max_num_batched_tokens=self._max_step_tokens,
            prefill_step_size=order.prefill_step_size,
            prefill_batch_size=order.prefill_batch_size,
            itl_goal_s=order.itl_goal_s,
            token_tile=self._token_tile,
            max_guesses=self._runner.max_guesses,
            lookahead_tokens=min(MAX_LOOKAHEAD, max(MIN_LOOKAHEAD, lookahead)),
            lookahead_share=self._policy.lookahead_share,
            copy_bytes_per_s=self._copy_bytes_per_s,
            max_prefill_pairs=self.ledger.max_step_pairs,
        )

    @property
    def _token_tile(self) -> int:
        """Beside decoding rows steps have whole tiles, so that forms come again (ADR 9)."""
        is_float32 = self._loaded.weights == "float32"
        is_replayed = is_float32 and self._runner.batching == "packed"
        return self._policy.token_tile if is_replayed else 1

    def cache_settings(self) -> CacheSettings:
        """Returns those of the prefix cache. Rows that run alone hold nothing that others could
        share."""
        order = self._order
        segment_bytes = self.ledger.kv_limit_bytes // self._policy.pool_segments
        return CacheSettings(
            is_on=order.prefix_cache and self._runner.batching != "alone",
            block_size=order.block_size,
            max_blocks=order.num_blocks,
            max_sequences=order.sequence_cache_size,
            segment_bytes=max(DEFAULT_SEGMENT_BYTES, segment_bytes),
        )


def _affordable_tokens(costs: StepCosts) -> int:
    """The token budget that makes an idle machine's prefill step take IDLE_STEP_S."""
    tokens = int(IDLE_STEP_S / costs.per_prefill_token_s) // 64 * 64
    return min(MAX_BATCHED_TOKENS, max(MIN_BATCHED_TOKENS, tokens))
