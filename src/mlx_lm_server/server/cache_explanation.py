"""Why a request was or was not served from the prefix cache, in words and text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.protocol import CacheReport

MAX_REMEMBERED = 256


class CacheExplanation(msgspec.Struct, frozen=True):
    """Of one prompt: `cached_tokens` were not computed, `from_running_requests` of them copied from
    rows in flight. Up to `nearest_tokens` it was equal to the nearest cached text; there it reads
    `prompt_text`, the cached one `nearest_text`. `why` says what kept the rest from being found,
    `recompute_s` forecasts what computing it costs on an idle machine."""

    prompt_tokens: int
    cached_tokens: int
    from_running_requests: int
    nearest_tokens: int
    prompt_text: str | None
    nearest_text: str | None
    why: str
    recompute_s: float


def explain(
    report: CacheReport, decode: Callable[[Sequence[int]], str], *, shows_text: bool
) -> CacheExplanation:
    """`shows_text` is false where the cached text may be somebody else's."""
    has_text = shows_text and bool(report.nearest_ids)
    return CacheExplanation(
        prompt_tokens=report.num_prompt_tokens,
        cached_tokens=report.num_cached_tokens,
        from_running_requests=report.num_from_rows,
        nearest_tokens=report.num_nearest_tokens,
        prompt_text=decode(report.prompt_ids) if has_text else None,
        nearest_text=decode(report.nearest_ids) if has_text else None,
        why=report.why,
        recompute_s=round(report.recompute_s, 6),
    )


@dataclass(frozen=True, slots=True)
class _Remembered:
    client_key: str
    reports: list[CacheReport]


class CacheReports:
    """Those of the last requests, by the id of their answer."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, _Remembered] = OrderedDict()

    def remember(self, id: str, client_key: str, reports: list[CacheReport]) -> None:
        self._by_id[id] = _Remembered(client_key, reports)
        while len(self._by_id) > MAX_REMEMBERED:
            self._by_id.popitem(last=False)

    def of(self, id: str | None, client_key: str) -> tuple[str, list[CacheReport]]:
        """Of this answer, or of the client's last one. Raises InvalidRequestError."""
        for known, remembered in reversed(self._by_id.items()):
            if remembered.client_key == client_key and id in (None, known):
                return known, remembered.reports
        what = "no request has ended yet" if id is None else f"{id} is not among the last requests"
        raise InvalidRequestError(f"{what}; {MAX_REMEMBERED} are remembered", param="id")
