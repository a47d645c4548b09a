"""Token ids of one sequence → its text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlx_lm_server.parsing.detokenizer import Detokenizer
from mlx_lm_server.parsing.stop_strings import StopStrings
from mlx_lm_server.protocol import FinishReason


class OutputProcessor:
    """Pure and per sequence. After a finish reason nothing more is taken. What ends a text is left
    out of it, unless `keeps_stop`. `num_chars` counts the letters of all tokens, held ones too."""

    __slots__ = (
        "_detokenizer",
        "_keeps_stop",
        "_min_tokens",
        "_stop_strings",
        "_stop_token_ids",
        "num_chars",
        "num_tokens",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str],
        stop_token_ids: Collection[int],
        min_tokens: int = 0,
        *,
        keeps_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_strings = (
            StopStrings(stop_strings, keeps_stop=keeps_stop) if stop_strings else None
        )
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._keeps_stop = keeps_stop
        self.num_chars = 0
        self.num_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return None if self._stop_strings is None else self._stop_strings.found

    @property
    def num_settled(self) -> int:
        """How many letters are known to belong to the text; those after a stop string never are."""
        return self.num_chars - (self._stop_strings.num_held if self._stop_strings else 0)

    def is_stop_token(self, token_id: int) -> bool:
        return token_id in self._stop_token_ids

    def push(
        self, ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, FinishReason | None]:
        """The text to send and, where the sequence ends here, why."""
        if self._stop_strings is not None:
            return self._push_one_by_one(self._stop_strings, ids, finish_reason)
        self.num_tokens += len(ids)
        if finish_reason is None:
            text = self._detokenizer.push(ids)
        else:
            text = self._detokenizer.push(self._without_stop_token(ids, finish_reason))
            text += self._detokenizer.flush()
        self.num_chars += len(text)
        return text, finish_reason

    def _push_one_by_one(
        self, stops: StopStrings, ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, FinishReason | None]:
        """Counts tokens up to the one that completes a stop string, however many came at once."""
        pieces: list[str] = []
        num_tokens = self.num_tokens + len(ids)
        for token_id in self._without_stop_token(ids, finish_reason):
            self.num_tokens += 1
            piece = self._detokenizer.push((token_id,))
            self.num_chars += len(piece)
            if self.num_tokens <= self._min_tokens:  # too early to stop
                pieces.append(piece)
                continue
            pieces.append(stops.push(piece))
            if stops.is_stopped:
                return "".join(pieces), "stop"
        self.num_tokens = num_tokens
        if finish_reason is not None:
            rest = self._detokenizer.flush()
            self.num_chars += len(rest)
            pieces.append(stops.push(rest))
            if stops.is_stopped:
                return "".join(pieces), "stop"
            pieces.append(stops.flush())
        return "".join(pieces), finish_reason

    def _without_stop_token(
        self, ids: Sequence[int], finish_reason: FinishReason | None
    ) -> Sequence[int]:
        ends = finish_reason == "stop" and bool(ids) and self.is_stop_token(ids[-1])
        return ids[:-1] if ends and not self._keeps_stop else ids
