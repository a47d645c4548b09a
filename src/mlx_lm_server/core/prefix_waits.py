"""Who leaves computing to others: a request does not compute what another one is about to compute,
it waits for its blocks, but no longer than computing them itself would take."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm_server.core.prefix_cache import PrefixCache
from mlx_lm_server.core.request import Request

# Who waits for another's prefix lets so many times its tokens be computed for others meanwhile.
WAIT_MARGIN = 1.5


class PrefixWaits:
    """Owned by the scheduler."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._tokens_left: dict[Request, float] = {}  # how many of others it still waits for
        self._waiting: list[Request] = []  # in the plan in the making

    def computing(self, prefilling: Sequence[Request]) -> list[Request]:
        """Returns those of the requests that compute in this step; the others wait for them."""
        self._waiting = [request for request in prefilling if self._waits(request, prefilling)]
        return [request for request in prefilling if request not in self._waiting]

    def others_compute(self, num_tokens: int) -> None:
        """Takes note of how many prompt tokens the step computes."""
        for request in self._waiting:
            self._tokens_left[request] -= num_tokens

    def forget(self, request: Request) -> None:
        self._tokens_left.pop(request, None)

    def _waits(self, request: Request, prefilling: Sequence[Request]) -> bool:
        """Whether the request leaves computing to somebody else: at most until others have had
        about as many tokens computed as it would have needed itself."""
        found = self._leader(request, prefilling)
        if found is None:
            return False
        leader, num_shared = found
        self._cache.add_state_point(leader, num_shared)
        own = num_shared - request.num_computed_tokens
        return self._tokens_left.setdefault(request, WAIT_MARGIN * own) > 0

    def _leader(
        self, request: Request, prefilling: Sequence[Request]
    ) -> tuple[Request, int] | None:
        """Somebody who is about to compute tokens that the request needs too, and up to where."""
        for other in prefilling:
            is_ahead = (-other.num_computed_tokens, other.urgency) < (
                -request.num_computed_tokens,
                request.urgency,
            )
            if not is_ahead:
                continue
            num_shared = self._cache.num_shared(request, other)
            if num_shared > other.num_computed_tokens:
                return other, num_shared
        return None
