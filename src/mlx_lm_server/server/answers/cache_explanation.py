"""Why a request was or was not served from the prefix cache, in words and text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.protocol import CacheReport

MAX_REMEMBERED = 256
MAX_KEYS = 4096


class CacheExplanation(msgspec.Struct, frozen=True):
    """What the cache did for one prompt. `cached_tokens` of it were not computed,
    `from_running_requests` of them copied from rows in flight. Up to `nearest_tokens` it was equal
    to the nearest cached text; there it reads `prompt_text`, the cached one `nearest_text`. `why`
    says what kept the rest from being found, `recompute_s` forecasts what computing it costs on an
    idle machine. `requests_with_key` counts the client's earlier requests of the same
    `prompt_cache_key`."""

    prompt_tokens: int
    cached_tokens: int
    from_running_requests: int
    nearest_tokens: int
    prompt_text: str | None
    nearest_text: str | None
    why: str
    recompute_s: float
    prompt_cache_key: str | None
    requests_with_key: int


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What is known of one HTTP request: the reports of its prompts, the `prompt_cache_key` that it
    gave, and how many earlier ones gave the same."""

    reports: Sequence[CacheReport]
    key: str | None = None
    num_with_key: int = 0


def explain(
    facts: CacheFacts, decode: Callable[[Sequence[int]], str], *, shows_text: bool
) -> list[CacheExplanation]:
    """Returns one explanation for each prompt. `shows_text` is false where the cached text may be
    somebody else's."""
    return [_explain(report, facts, decode, shows_text) for report in facts.reports]


def _explain(
    report: CacheReport,
    facts: CacheFacts,
    decode: Callable[[Sequence[int]], str],
    shows_text: bool,
) -> CacheExplanation:
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
        prompt_cache_key=facts.key,
        requests_with_key=facts.num_with_key,
    )


@dataclass(frozen=True, slots=True)
class _Remembered:
    client_key: str
    facts: CacheFacts


class CacheKeys:
    """How often each client gave each `prompt_cache_key`; those not heard of for longest are
    forgotten."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[str, str], int] = OrderedDict()

    def count(self, client_key: str, key: str) -> int:
        """Counts a key once more, and returns how often it came before."""
        num_before = self._counts.pop((client_key, key), 0)
        self._counts[client_key, key] = num_before + 1
        if len(self._counts) > MAX_KEYS:
            self._counts.popitem(last=False)
        return num_before


class CacheReports:
    """What is known of the last requests, by the id of their answer."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, _Remembered] = OrderedDict()

    def remember(self, id: str, client_key: str, facts: CacheFacts) -> None:
        self._by_id[id] = _Remembered(client_key, facts)
        while len(self._by_id) > MAX_REMEMBERED:
            self._by_id.popitem(last=False)

    def of(self, id: str | None, client_key: str) -> tuple[str, CacheFacts]:
        """Returns the id and the facts of this answer, or of the client's last one. Raises
        InvalidRequestError."""
        for known, remembered in reversed(self._by_id.items()):
            if remembered.client_key == client_key and id in (None, known):
                return known, remembered.facts
        what = "no request has ended yet" if id is None else f"{id} is not among the last requests"
        raise InvalidRequestError(f"{what}; {MAX_REMEMBERED} are remembered", param="id")
