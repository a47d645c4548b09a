"""How rows of any length lie on a GPU: attention calls a layer, memory held, tokens copied for it.

Pure Python; K and V are those of a 4B model (36 layers, 8 heads of 128, 16 bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import CreateSlab, MoveRow, ResizeSlab
from mlx_lm_server.core.scheduler_limits import SchedulerLimits
from mlx_lm_server.core.slab_rules import MAX_SLABS, SlabRules

TOKEN_BYTES = 36 * 2 * 8 * 128 * 2
LIMIT_BYTES = 80 << 30
NUM_ROWS = 32
LIMITS = SchedulerLimits(lookahead_tokens=1024, lookahead_share=1 / 8)


@dataclass(frozen=True, slots=True)
class Lying:
    """Says how rows lie that came one after the other: the most slabs there were, and what is held
    and was copied over what the rows have."""

    num_slabs: int
    held: float
    copied: float


def slabs(effort: Effort) -> Findings:
    """How many attention calls a layer rows of any length take, and what they hold for it."""
    num_draws = 40 if effort.is_quick else 400
    draws = [log_uniform(seed) for seed in range(num_draws)]
    found = {step: [lying(lengths, step) for lengths in draws] for step in (32, 256)}
    claims = []
    for step, each in found.items():
        name = f"32 rows of 50 to 16k tokens, capacities in {step}s"
        claims += [
            Claim(f"{name}: attention calls a layer", max(x.num_slabs for x in each), at_most=6),
            Claim(
                f"… held over live, at most of {num_draws}", max(x.held for x in each), None, 1.5
            ),
            Claim("… tokens copied for each", max(x.copied for x in each), at_most=7),
        ]
    for length in (100, 500):
        claims.append(Claim(f"32 rows of {length}: held", lying([length] * 32, 32).held, None, 4))
    figures = {str(step): [[x.num_slabs, x.held, x.copied] for x in found[step]] for step in found}
    return claims, figures


def lying(lengths: Sequence[int], capacity_step: int) -> Lying:
    """Places rows one after the other, each with room for some of its answer."""
    rules = SlabRules(LIMIT_BYTES // 8, None, capacity_step=capacity_step, max_slabs=MAX_SLABS)
    layout = KVLayout(KVGeometry(TOKEN_BYTES), LIMIT_BYTES, rules, max_rows=len(lengths))
    num_slots: dict[int, tuple[int, int]] = {}  # with the capacity
    copied = most_slabs = 0
    for row, length in enumerate(lengths):
        layout.place(row, length + LIMITS.lookahead(length))
        for op in layout.settle():
            match op:
                case CreateSlab():
                    num_slots[op.slab_id] = op.num_slots, op.capacity
                case ResizeSlab():
                    before, capacity = num_slots[op.slab_id]
                    copied += min(before, op.num_slots) * capacity
                    num_slots[op.slab_id] = op.num_slots, capacity
                case MoveRow():
                    copied += op.num_tokens
                case _:
                    pass
        layout.set_num_tokens(row, length)
        most_slabs = max(most_slabs, layout.num_slabs)
    live = sum(lengths)
    return Lying(most_slabs, layout.used_bytes / TOKEN_BYTES / live, copied / live)


def log_uniform(seed: int) -> list[int]:
    rng = Random(seed)
    return [int(50 * 320 ** rng.random()) for _ in range(NUM_ROWS)]
