"""A proposer that knows the answers of the simulator, and errs at random."""

from __future__ import annotations

import random

from scheduler_sim import token_at

from mlx_lm_server.core.request import Request


class ToyProposer:
    """Proposes up to `most` tokens, each of which is right with a probability of `accuracy`."""

    def __init__(self, accuracy: float, seed: int = 0) -> None:
        self._accuracy = accuracy
        self._rng = random.Random(seed)

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        first = len(request.output_ids)
        right = [token_at(request.sampling.seed, first + i) for i in range(most)]
        count = self._rng.randint(0, most)
        return tuple(t if self._rng.random() < self._accuracy else 99 for t in right[:count])
