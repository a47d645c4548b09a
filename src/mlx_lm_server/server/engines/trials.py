"""Finds the request that an engine dies of, while all others go on.

When an engine has died, those in its last steps are suspects, but not who got a token from it after
it was started: they were computed and did no harm. The next engine gets

    first   who had moved, since they were in the middle of an answer
    then    the suspects, in two halves, the second when each of the first has got a token
    last    everybody else

so that another death has fewer suspects. The last one is given an engine of its own, and where that
dies of it too, it is guilty. Everybody else has lost time only. An engine may also be killed from
outside: who is suspected once, and then gets a token, is suspected no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mlx_lm_server.server.engines.output_stream import OutputStream

Group = Sequence[OutputStream]


class Trials:
    """Says whom an engine is given next after a death. Owned by the client."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()
        self._on_trial: Group = ()

    @property
    def are_over(self) -> bool:
        """Returns whether everybody may go to the engine."""
        return not self._groups and not self._on_trial

    def open(self, under_way: Group) -> OutputStream | None:
        """Takes up a death with these in the engine's last steps. Returns the guilty one, where
        that is known now."""
        suspects = [stream for stream in under_way if not stream.has_moved]
        moved = [stream for stream in under_way if stream.has_moved]
        self._on_trial, self._groups = (), deque()
        is_last = len(suspects) == 1 and suspects[0].num_suspected > 0
        if is_last and not moved:
            return suspects[0]
        for stream in suspects:
            stream.num_suspected += 1
        middle = (len(suspects) + 1) // 2
        first, second = suspects[:middle], suspects[middle:]
        order = (first, moved) if is_last else (moved, first, second)
        self._groups.extend(group for group in order if group)
        return None

    def next_group(self) -> Group:
        """Returns who is given to the engine now; nobody while some have not moved yet, and when
        all trials are over."""
        if any(not (stream.has_moved or stream.is_ended) for stream in self._on_trial):
            return ()
        self._on_trial = ()
        while self._groups and not self._on_trial:
            self._on_trial = [stream for stream in self._groups.popleft() if not stream.is_ended]
        return self._on_trial
