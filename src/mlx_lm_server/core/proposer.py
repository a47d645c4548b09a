"""What guesses the tokens that come next, so that one forward can try several (Leviathan et al.
2023). Guesses that the model would not have drawn itself are taken back, so a proposer changes how
long an answer takes, never what it says."""

from __future__ import annotations

from typing import Protocol

from mlx_lm_server.core.request import Request


class Proposer(Protocol):
    """Asked on the engine's thread while a plan is made."""

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        """Returns up to `most` tokens that may follow those which are known of the request; none
        where trying is not worth it."""
