"""What requests found in the prefix cache, counted and told: how much, from where, and why not
more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from mlx_lm_server.core.cache_index import CacheIndex
from mlx_lm_server.core.chain import Chain
from mlx_lm_server.core.hit import Hit
from mlx_lm_server.protocol import CacheReport

# How many tokens from where two texts part a report shows.
SHOWN_IDS = 24
# Why no more of a prompt was found.
LACKS_ROOM = "what is cached and the row that would take it do not fit the memory together"
DIFFERS = "the prompt differs there from what is cached"
ENDS = "the text that is cached ends there"


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What can be found at all: blocks, and checkpoints of other state; nothing where the cache
    is off."""

    is_on: bool
    block_size: int
    has_blocks: bool
    has_state: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """How much of a prompt was found, how much of that in rows, and the row that it ends in where
    that has not filled the block there."""

    num_tokens: int = 0
    num_from_rows: int = 0
    row: int | None = None


class CacheReports:
    """Owned by the prefix cache, whose index and rows it looks into; `in_row` says whose chain the
    named blocks of a row belong to."""

    def __init__(self, kind: CacheKind, index: CacheIndex, in_row: Mapping[int, Chain]) -> None:
        self._kind = kind
        self._size = kind.block_size
        self._index = index
        self._in_row = in_row
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def note_admission(
        self, chain: Chain, hit: Hit | None, recompute_s: float, *, lacks_room: bool = False
    ) -> None:
        """Count what the request found and report it; when it gets its first row. `lacks_room`:
        it found something that does not fit the memory beside its row."""
        self.num_queried_tokens += len(chain.request.prompt_ids)
        self.num_hit_tokens += hit.stop if hit else 0
        taken = _Found(hit.stop, self._num_from_rows(hit), hit.row) if hit else _Found()
        chain.report = self._report(chain, taken, recompute_s, lacks_room=lacks_room)

    def note_catching_up(
        self, chain: Chain, hit: Hit, recompute_s: float, *, is_last: bool
    ) -> None:
        """Count what the request takes over later: from others that computed it meanwhile, or the
        next part of what it found. Not after a preemption, when what it finds may be its own."""
        report = chain.report
        if report is None or chain.request.num_preemptions:
            return
        self.num_hit_tokens += hit.stop - hit.start
        num_cached = report.num_cached_tokens + hit.stop - hit.start
        num_from_rows = report.num_from_rows + self._num_from_rows(hit)
        if num_cached == hit.stop and is_last:
            taken = _Found(num_cached, num_from_rows, hit.row)
            chain.report = self._report(chain, taken, recompute_s, lacks_room=False)
        else:  # more is to come, or in between are tokens of its own, which are no cached text
            chain.report = structs.replace(
                report, num_cached_tokens=num_cached, num_from_rows=num_from_rows
            )

    def _num_from_rows(self, hit: Hit) -> int:
        num_tokens = sum(not block.place for block in hit.blocks) * self._size
        if hit.row is not None:
            num_tokens += hit.stop % self._size
        return min(num_tokens, hit.stop - hit.start)

    def _report(
        self, chain: Chain, taken: _Found, recompute_s: float, *, lacks_room: bool
    ) -> CacheReport:
        prompt = chain.request.prompt_ids
        nearest, other_ids = self._nearest(chain, taken)
        why = self._why_not_all(chain, taken.num_tokens, nearest, differs=bool(other_ids))
        return CacheReport(
            num_prompt_tokens=len(prompt),
            num_cached_tokens=taken.num_tokens,
            num_from_rows=taken.num_from_rows,
            num_nearest_tokens=nearest,
            prompt_ids=list(prompt[nearest : nearest + SHOWN_IDS]) if other_ids else [],
            nearest_ids=list(other_ids),
            why=LACKS_ROOM if lacks_room and why else why,
            recompute_s=recompute_s,
        )

    def _nearest(self, chain: Chain, taken: _Found) -> tuple[int, Sequence[int]]:
        """Finds up to where the prompt is equal to the nearest cached text, and how that goes on
        if it does so otherwise than the prompt."""
        prompt = chain.request.prompt_ids
        if not self._kind.has_blocks:
            return taken.num_tokens, []
        num_blocks = len(self._index.walk(chain, 0, len(prompt)))
        child, in_child = self._index.nearest_child(chain, num_blocks, len(prompt))
        nearest = num_blocks * self._size + in_child
        other_ids: Sequence[int] = []
        if taken.num_tokens > nearest:  # in a block that a row has not filled yet
            nearest = taken.num_tokens
            if taken.row is not None:
                other_ids = self._in_row[taken.row].known_ids(nearest, nearest + SHOWN_IDS)
        elif child is not None and nearest:
            other_ids = self._index.ids_from(child, in_child, SHOWN_IDS)
        differs = bool(other_ids) and nearest < len(prompt) and other_ids[0] != prompt[nearest]
        return nearest, other_ids if differs else []

    def _why_not_all(self, chain: Chain, num_cached: int, nearest: int, *, differs: bool) -> str:
        """What kept the rest from being found, where it is not for want of memory."""
        num_prompt, block = len(chain.request.prompt_ids), f"a block ({self._size} tokens)"
        if num_cached >= num_prompt - 1:
            return ""
        if not self._kind.is_on:
            return "the prefix cache is off"
        if chain.request.sampling.prompt_logprobs is not None:
            return "logprobs of the prompt were asked for, so all of it is computed"
        if num_prompt <= self._size:
            return f"the prompt is not longer than {block}, and nothing less is taken up"
        if not self._kind.has_blocks:
            return "no checkpoint of the model's state is kept further on"
        if nearest == 0:
            return "nothing that begins like this is cached"
        why = DIFFERS if differs else ENDS
        if nearest == num_cached:
            return why
        if nearest < self._size:
            return f"{why}, and nothing less than {block} is taken up"
        if self._kind.has_state:
            return "the model keeps state that can be taken up only at checkpoints"
        if nearest - num_cached < self._size:
            return f"{why}, and what is left up to there is less than {block}"
        return "the rest of what is cached was left to later steps, beside others that decode"
