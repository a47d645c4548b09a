"""What requests do in a step, as the plan says it."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lm_server.core.plan import JoinedRow, RowWork
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.slabs import Location


def decode_work(request: Request, place: Location, guesses: tuple[int, ...]) -> RowWork:
    """Returns the work of a row that goes on from its last token; with guesses, which are tried
    after it, that token is known."""
    token_ids = None
    if guesses:
        num_known = request.num_known_tokens
        token_ids = (*request.known_ids(num_known - 1, num_known), *guesses)
    yields = 1 + len(guesses)
    return RowWork(
        row=request.held_row,
        slab_id=place.slab_id,
        slot=place.slot,
        start=request.num_computed_tokens,
        token_ids=token_ids,
        yields=yields,
        is_awaited=yields >= request.num_tokens_to_plan,
    )


def chunk_work(request: Request, place: Location, num_tokens: int) -> RowWork:
    """Returns the work of a row that computes so many more of its known tokens."""
    start = request.num_computed_tokens
    samples = start + num_tokens == request.prefill_until
    return RowWork(
        row=request.held_row,
        slab_id=place.slab_id,
        slot=place.slot,
        start=start,
        token_ids=request.known_ids(start, start + num_tokens),
        yields=1 if samples else 0,
        is_awaited=samples,
    )


def by_place(works: Iterable[RowWork]) -> tuple[RowWork, ...]:
    """Returns the works in the order in which their rows lie."""
    return tuple(sorted(works, key=lambda work: (work.slab_id, work.slot)))


def joined_row(request: Request) -> JoinedRow:
    """Returns what the runner has to know of a request that gets a row."""
    return JoinedRow(
        req_id=request.req_id,
        row=request.held_row,
        prompt_ids=request.prompt_ids,
        output_ids=tuple(request.output_ids),
        sampling=request.sampling,
    )
