"""Chooses how a model's plans run, with tiny plans of its own.

The reference is mlx-lm's model with mlx-lm's caches, one row at a time; the
fastest way whose logits agree with it is taken. So what is asked of a family is found out when it
is loaded, and a family that nobody has heard of is served in the way that fits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.plan import CreateSlab, StepPlan
from mlx_lm_server.protocol import Batching
from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.loading.tiny_plans import (
    LARGE_SLAB,
    SMALL_SLAB,
    chunk_of,
    decode_of,
    plan_of,
    scratch,
    token_of,
)
from mlx_lm_server.runner.seam.attention import SEAM_ERRORS
from mlx_lm_server.runner.seam.forwards import (
    AloneForward,
    Candidate,
    Forward,
    PackedForward,
    SplitForward,
    arrays_of,
)
from mlx_lm_server.runner.seam.language_model import LanguageModel
from mlx_lm_server.runner.state.cache_kinds import ModelState
from mlx_lm_server.runner.state.kv_storage import KVStorage

PROBE_TOKENS = 12
ALONE_STEP = 256
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-4, 0.06


@dataclass(frozen=True, slots=True)
class Choice:
    """The way that was chosen, made for any storage by `over`, and why not the ones before it."""

    batching: Batching
    over: Candidate
    refused: dict[str, str]

    @property
    def reason(self) -> str:
        ways: dict[str, list[str]] = {}
        for way, reason in self.refused.items():
            ways.setdefault(reason, []).append(way)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in ways.items())


def choose_forward(
    lm: LanguageModel, state: ModelState | None, why_no_state: str, backend: Backend
) -> Choice:
    """The first of the ways, the best first, that gives mlx-lm's logits where K and V are kept as
    the model makes them."""
    refused = {}
    storage = KVStorage(state.kv if state else [], backend)
    if state is None:
        refused["batched"] = why_no_state
    elif state.recurrent:
        refused["packed"] = "recurrent state takes a row's tokens in order"
    reference = _Reference(lm)
    for name, candidate in _candidates(lm, state, backend):
        forward = candidate(storage)
        reason = _disagreement(forward, reference, storage)
        if reason is None:
            return Choice(forward.batching, candidate, refused)
        refused[name] = reason
    return Choice("alone", lambda _: AloneForward(lm), refused)


def _candidates(
    lm: LanguageModel, state: ModelState | None, backend: Backend
) -> list[tuple[str, Candidate]]:
    if state is None:
        return []
    dtype = state.kv[0].dtype if state.kv else mx.float32
    kernel = backend.kernel(dtype)
    ways: list[tuple[str, Candidate]] = []
    if not state.recurrent:
        ways.append(("packed", lambda storage: PackedForward(lm, state, storage, kernel)))
    ways.append(("split", lambda storage: SplitForward(lm, state, storage, kernel)))
    if state.kv:
        ways.append(("fetched", lambda storage: SplitForward(lm, state, storage, kernel, 4)))
        by_head = "fetched, by KV head"
        ways.append((by_head, lambda storage: SplitForward(lm, state, storage, kernel, 5)))
    return ways


def _disagreement(forward: Forward, reference: _Reference, storage: KVStorage) -> str | None:
    """Runs the probe's plans and holds them against mlx-lm; what went wrong, in words."""
    with scratch(storage, CreateSlab(SMALL_SLAB, 2, 64), CreateSlab(LARGE_SLAB, 2, 96)):
        try:
            worst = max(_differences(forward, reference))
        except SEAM_ERRORS as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            forward.forget(range(4))
            storage.take_unread()
    return None if worst <= 1.0 else "its logits differ from mlx-lm's"


class _Reference:
    """What mlx-lm's model with mlx-lm's caches says of the rows of the probe's plans, each in one
    forward: a token's logits are the same however its row was cut."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._logits: dict[int, mx.array] = {}

    def logits(self, places: Sequence[tuple[int, int]]) -> mx.array:
        """Returns the logits after the tokens at some rows and positions, `[n, vocab]`."""
        return mx.stack([self._of(row)[position] for row, position in places])

    def _of(self, row: int) -> mx.array:
        if row not in self._logits:
            from mlx_lm.models.cache import make_prompt_cache

            works = [work for plan in _probe_plans() for work in plan.works]
            length = max(work.end for work in works if work.row == row)
            ids = mx.array([[token_of(row, position) for position in range(length)]], mx.int32)
            self._logits[row] = self._lm(ids, make_prompt_cache(self._lm.model))
            mx.eval(self._logits[row])
        return self._logits[row]


def _differences(forward: Forward, reference: _Reference) -> Iterator[float]:
    """For each plan the largest difference of logits, in units of what is tolerated."""
    for plan in _probe_plans():
        ids = mx.array(
            [token_of(d.row, d.start) for d in plan.decodes]
            + [token for chunk in plan.chunks for token in chunk.known_ids],
            mx.int32,
        )
        outcome = forward.run(plan, ids)
        mx.eval(outcome.result, *outcome.beside)
        places = _sampling_places(plan)
        if not places:
            continue
        ours, theirs = outcome.result, reference.logits(places)
        tolerance = FLOAT32_TOLERANCE if theirs.dtype == mx.float32 else HALF_TOLERANCE
        ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
        spread = max(1.0, float(mx.max(mx.abs(theirs))))
        error = float(mx.max(mx.abs(ours - theirs)))
        yield error / (tolerance * spread) if error == error else float("inf")


def _sampling_places(plan: StepPlan) -> list[tuple[int, int]]:
    """Rows and positions whose logits a plan gives, in its order."""
    return [
        (work.row, position)
        for work in plan.sampling
        for position in range(work.end - work.yields, work.end)
    ]


def _probe_plans() -> Iterator[StepPlan]:
    """Chunks of several rows side by side and one after another, then rows of different lengths in
    two slabs that decode together, beside chunks, with a row that sits out and one that joins, and
    a row whose every token is asked for."""
    half = PROBE_TOKENS // 2
    yield plan_of(chunks=[chunk_of(0, 0, half)])
    yield plan_of(chunks=[chunk_of(0, half, 2), chunk_of(2, 0, 3)])
    yield plan_of([decode_of(0, half + 2)], [chunk_of(1, 0, half - 1, yields=0)])
    yield plan_of(chunks=[chunk_of(1, half - 1, 1)])
    yield plan_of([decode_of(0, half + 3), decode_of(1, half), decode_of(2, 3)])
    yield plan_of([decode_of(0, half + 4), decode_of(2, 4)])
    yield plan_of([decode_of(1, half + 1)], [chunk_of(3, 0, 1)])
    yield plan_of(
        [decode_of(0, half + 5), decode_of(1, half + 2), decode_of(3, 1)],
        [chunk_of(2, 5, 2, yields=2)],
    )


def check_replays(forward: Forward, storage: KVStorage) -> None:
    """Do without replays unless they give the very logits that building gives: MLX fuses what
    stands side by side in a trace, and some of that may round otherwise."""
    if not isinstance(forward, PackedForward) or forward.replays is None:
        return
    plan = plan_of([decode_of(0, 3), decode_of(2, 5)])
    ids = mx.array([token_of(d.row, d.start) for d in plan.decodes], mx.int32)
    with scratch(storage, CreateSlab(SMALL_SLAB, 2, 64), CreateSlab(LARGE_SLAB, 2, 96)):
        forward.replays.traces_at_once = True
        built, replayed = (forward.run(plan, ids).result for _ in range(2))
        forward.replays.traces_at_once = False
        try:
            mx.eval(built, replayed)
            is_same = bool(mx.array_equal(built, replayed, equal_nan=True))
        except SEAM_ERRORS:  # no compiler for what was fused
            is_same = False
    if not is_same:
        forward.replays = None


def geometry_of_rows_alone(lm: LanguageModel) -> KVGeometry:
    """What a row with mlx-lm's own caches takes, at most: they grow by steps of 256 tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(lm.model)
    mx.eval(lm(mx.ones((1, ALONE_STEP), mx.int32), caches, []), arrays_of(caches))
    per_token = -(-sum(array.nbytes for array in arrays_of(caches)) // ALONE_STEP)
    return KVGeometry(per_token, bytes_per_row=per_token * ALONE_STEP)
