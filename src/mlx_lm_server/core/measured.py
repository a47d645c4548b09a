"""What is measured of a model on a machine before it is served."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.memory_ledger import ForwardBytes
from mlx_lm_server.core.submitting import Submitting


@dataclass(frozen=True, slots=True)
class Measured:
    """`num_threads` is how many a BLAS is fastest with, None where that was not asked.
    `copy_bytes_per_s` is how fast K and V go from place to place, `submitting` both ways to submit
    forwards, where there are two. `is_steady`: what there was time to run twice took the same time
    twice."""

    num_threads: int | None
    costs: StepCosts
    forward_bytes: ForwardBytes
    copy_bytes_per_s: float
    submitting: Submitting | None = None
    is_steady: bool = True
