"""Who is admitted next: fair between clients first, then by priority, then by arrival.

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"): each
client has a counter of the tokens it was served, a generated one counting twice a prompt one, and
the waiting client with the smallest counter is next. A client that comes back after a pause is
lifted to the others' level, so that idle time is no credit.

Among the requests of one client a higher `priority` number is more urgent. A preempted request
waits at the head of its priority.
"""

from __future__ import annotations

from bisect import insort

from mlx_lm_server.core.request import Request, RequestStatus

PROMPT_TOKEN_WEIGHT = 1.0
OUTPUT_TOKEN_WEIGHT = 2.0
MAX_IDLE_CLIENTS = 256


def _place_in_line(request: Request) -> tuple[int, bool, int]:
    is_new = request.status is not RequestStatus.PREEMPTED
    return (-request.priority, is_new, request.arrival_order)


class FairQueue:
    """Waiting requests by client. Owned by the scheduler."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Request]] = {}
        self._served: dict[str, float] = {}
        self._last_client = ""  # whose request was admitted last

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._waiting.values())

    def push(self, request: Request) -> None:
        if request.client_key not in self._waiting:
            self._lift(request.client_key)
            self._waiting[request.client_key] = []
        insort(self._waiting[request.client_key], request, key=_place_in_line)

    def peek(self) -> Request | None:
        """The request that is next, or None where nobody waits."""
        heads = (requests[0] for requests in self._waiting.values())
        return min(heads, key=self._turn, default=None)

    def pop(self) -> Request:
        """Take out what `peek` shows."""
        request = self.peek()
        assert request is not None, "peek before you pop"
        self._last_client = request.client_key
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        requests = self._waiting[request.client_key]
        requests.remove(request)
        if not requests:
            del self._waiting[request.client_key]

    def charge(self, client_key: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count what a client was served."""
        served = prompt_tokens * PROMPT_TOKEN_WEIGHT + output_tokens * OUTPUT_TOKEN_WEIGHT
        self._served[client_key] = self.served(client_key) + served

    def served(self, client_key: str) -> float:
        """The client's counter, in weighted tokens."""
        return self._served.get(client_key, self._level)

    @property
    def _level(self) -> float:
        """Where a client starts that comes to an empty queue."""
        return self._served.get(self._last_client, 0.0)

    def _turn(self, request: Request) -> tuple[float, tuple[int, bool, int]]:
        return (self._served[request.client_key], _place_in_line(request))

    def _lift(self, client_key: str) -> None:
        self._forget_idle_clients()
        level = min((self._served[key] for key in self._waiting), default=self._level)
        self._served[client_key] = max(level, self._served.get(client_key, level))

    def _forget_idle_clients(self) -> None:
        """Drop counters that the lift would raise anyway; without it they pile up for ever."""
        if len(self._served) - len(self._waiting) <= MAX_IDLE_CLIENTS:
            return
        level = self._level
        self._served = {
            key: served
            for key, served in self._served.items()
            if key in self._waiting or key == self._last_client or served > level
        }
