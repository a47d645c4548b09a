"""Who runs in the next step. There are no phases: each request's `num_computed_tokens` catches up
with its `num_tokens` within the step's budget of tokens, time and memory.

The engine plans one step ahead of what it has read:

    schedule(1)  schedule(2)  update(1)  schedule(3)  update(2)  …

so a row may be planned on a token that is still on the device (pending). With a proposer each step
is read before the next is planned, since how far its rows come decides where they go on.

Invariants:

- a row is never planned past `max_new_tokens`; it begins to leave with the plan after its last
  token;
- a stop token is seen one step late: the token of the step in between is dropped, and the row
  begins to leave with the next plan;
- a row leaves in parts, a few blocks a step, as long as others run and nobody waits for its place;
- a row number that is given back is used again in later plans only;
- the most urgent running request always goes on; when a row cannot grow, first the prefix cache
  gives back memory, then the least urgent request is preempted and later computes anew what of its
  tokens the cache has not kept, once nothing of it is pending;
- a request does not compute what another one is about to compute (prefix_waits.py);
- a row whose guesses failed goes on from where they did: what was computed of them is overwritten;
- a request for which the tier reads is not in the queue yet, so that others pass it; it waits no
  longer than computing what is read would take;
- each request gets exactly one output with a finish reason.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from operator import attrgetter

from mlx_lm_server.core.cost_model import CostModel, StepFeatures, prefill_pairs
from mlx_lm_server.core.departures import Departures
from mlx_lm_server.core.fair_queue import FairQueue
from mlx_lm_server.core.hit import Hit
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.loading import LoadPlan
from mlx_lm_server.core.memory_ledger import request_arithmetic
from mlx_lm_server.core.plan import RowResult, RowWork, StepPlan, StepResult
from mlx_lm_server.core.prefill import PrefillPlan
from mlx_lm_server.core.prefix_cache import PrefixCache
from mlx_lm_server.core.prefix_waits import PrefixWaits
from mlx_lm_server.core.proposer import Proposer
from mlx_lm_server.core.request import Request, RequestStatus
from mlx_lm_server.core.row_room import RowRoom
from mlx_lm_server.core.row_works import by_place, chunk_work, decode_work, joined_row
from mlx_lm_server.core.scheduler_limits import SchedulerLimits
from mlx_lm_server.errors import InvalidRequestError, RequestTooLargeError
from mlx_lm_server.protocol import EngineStats, FinishReason, RequestOutput

__all__ = ["Scheduler", "SchedulerLimits"]

Guesses = Mapping[Request, tuple[int, ...]]


class Scheduler:
    """Owns all requests, the rows and the layout of their memory. Lives on the engine's thread."""

    def __init__(
        self,
        limits: SchedulerLimits,
        layout: KVLayout,
        cost_model: CostModel,
        cache: PrefixCache,
        proposer: Proposer | None = None,
    ) -> None:
        self._limits = limits
        self._layout = layout
        self._cache = cache
        self._room = RowRoom(layout, cache, limits.lookahead)
        self._waits = PrefixWaits(cache)
        self._proposer = proposer if limits.max_guesses else None
        self._cost_model = cost_model
        self._requests: dict[str, Request] = {}  # all unfinished ones
        self._queue = FairQueue()
        self._running: list[Request] = []  # the most urgent first
        self._departures = Departures(cache, layout)
        self._free_rows = list(reversed(range(limits.max_batch_size)))
        self._left_rows: list[int] = []  # given back by the plan in the making
        self._in_flight: dict[int, dict[int, Request]] = {}  # by step and row
        self._num_arrived = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_prefill_tokens = 0
        self._forecast_step_s = 0.0
        self._ramp_tokens = limits.first_chunk_tokens

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLargeError where its prompt can never fit the memory;
        where only its answer may not fit, it will end with `length` at the last token that does."""
        if not request.prompt_ids:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if request.sampling.max_tokens < 1:
            raise InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
        if request.req_id in self._requests:
            raise InvalidRequestError(f"{request.req_id} is in work already", param="req_id")
        request.max_new_tokens = self._max_new_tokens(request)
        request.arrival_order = self._num_arrived
        self._num_arrived += 1
        self._requests[request.req_id] = request
        if not self._cache.enter(request, self._compute_s):
            self._queue.push(request)

    def abort(self, req_id: str) -> RequestOutput | None:
        """End a request now; None where it is unknown or has ended by itself. Its row, if it has
        one, begins to leave with the next plan."""
        request = self._requests.get(req_id)
        if request is None:
            return None
        self._finish(request, "abort")
        return RequestOutput(req_id=req_id, token_ids=[], finish_reason="abort")

    def abort_all(self) -> None:
        for req_id in list(self._requests):
            self.abort(req_id)

    def _max_new_tokens(self, request: Request) -> int:
        """The last token that is sampled is never computed, so it needs no memory."""
        most = self._layout.max_tokens_that_fit
        num_tokens = request.num_known_tokens
        if num_tokens > most:
            size = self._layout.geometry
            raise RequestTooLargeError(
                f"the prompt can never fit: {request_arithmetic(num_tokens, size)}, but the limit "
                f"is {request_arithmetic(most, size)}",
                param="prompt",
                code="context_length_exceeded",
            )
        return min(request.sampling.max_tokens, most - len(request.prompt_ids) + 1)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._departures.add(request)
        elif self._cache.is_waiting(request):
            self._cache.end_wait(request)
        elif request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            self._queue.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        self._waits.forget(request)
        if request.row is None:
            self._cache.forget(request)
        del self._requests[request.req_id]

    # ---- plan a step

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None where there is nothing to do before the next `add` or `update`.
        A plan without decodes and prefills only gives rows and memory back."""
        assert len(self._in_flight) <= 1, "read a step before you plan the next but one"
        self._free_rows += reversed(self._left_rows)
        self._left_rows = []
        self._cache.begin()
        for request in self._cache.take_restored(now_s):
            self._queue.push(request)
        self._give_back_rows()
        num_preemptions = self._num_preemptions
        decoding = self._choose_decodes()
        guesses = self._guess(decoding)
        decode = _features_of(decoding, guesses)
        loads = LoadPlan(self._limits, self._cost_model, decode)
        self._catch_up(loads)
        # Not in the step that preempts: the victim would take back what it just gave.
        joined = self._admit(now_s, loads) if self._num_preemptions == num_preemptions else []
        chunks = self._choose_chunks(decode, loads)
        if not (self._left_rows or joined or decoding or chunks or self._cache.has_operations):
            return None
        return self._make_plan(joined, decoding, guesses, chunks)

    def _give_back_rows(self) -> None:
        """Rows of finished requests, and of those whose last token is planned."""
        for request in [r for r in self._running if r.num_tokens_to_plan == 0]:
            self._running.remove(request)
            self._departures.add(request)
            request.status = RequestStatus.DRAINING
        at_once = not self._running or self._is_place_wanted()
        most_bytes = self._limits.leaving_bytes_in(self._forecast_step_s)
        self._left_rows += self._departures.go_on(None if at_once else most_bytes)

    def _is_place_wanted(self) -> bool:
        """Whether the next request in the queue waits for what a row that leaves still has."""
        if not self._departures or (request := self._queue.peek()) is None:
            return False
        num_tokens = self._room.tokens_soon(request)
        return (
            not self._free_rows
            or not self._layout.can_place(num_tokens)
            or self._departures.would_place(num_tokens)
        )

    def _choose_decodes(self) -> list[Request]:
        decoding = []
        for request in list(self._running):
            if request.row is None or request.is_prefilling:
                continue
            assert request.num_pending_tokens <= 1, "read guesses before the row goes on"
            if self._make_room(request):
                decoding.append(request)
        self._room.grow_one_ahead(decoding)
        return decoding

    @property
    def plans_after_reading(self) -> bool:
        """Whether the step in flight has to be read before the next one is planned."""
        return self._proposer is not None

    def _guess(self, decoding: Sequence[Request]) -> Guesses:
        """Returns what is tried of rows that decode, where memory is there at nobody's cost."""
        if self._proposer is None:
            return {}
        guesses = {}
        tokens_left = self._limits.max_num_batched_tokens - len(decoding)
        for request in decoding:
            left = min(request.num_tokens_to_plan - 1, self._room.spare_tokens(request))
            most = min(self._limits.max_guesses, left, tokens_left)
            if most > 0 and (ids := self._proposer.propose(request, most)[:most]):
                guesses[request] = ids
                tokens_left -= len(ids)
        return guesses

    def _make_room(self, request: Request) -> bool:
        """Have a place for one more token, if need be at the cost of less urgent requests; False
        where the request itself is the least urgent and had to give way."""
        if self._departures and not self._room.has_next(request):
            self._left_rows += self._departures.go_on(None)
        while not self._room.find_next(request):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._left_rows.append(self._departures.leave(request))
        request.num_computed_tokens = 0
        request.prefill_until = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._num_preemptions += 1
        self._queue.push(request)

    def _admit(self, now_s: float, loads: LoadPlan) -> list[Request]:
        """Requests from the queue that get a row now, in the queue's order: nobody overtakes one
        that waits for memory."""
        joined = []
        while self._free_rows and (request := self._queue.peek()) is not None:
            num_tokens = self._room.tokens_soon(request)
            if not self._layout.could_place(num_tokens):
                break
            hit = self._cache.find(request)
            lacks_room = not self._room.find_place(num_tokens, hit)
            if lacks_room:
                hit = None
                if not self._room.find_place(num_tokens, None):
                    break
            joined.append(self._queue.pop())
            part = self._part_of(hit, request, loads)
            self._join(request, num_tokens, part, now_s, lacks_room=lacks_room)
        return joined

    def _join(
        self,
        request: Request,
        num_tokens: int,
        hit: Hit | None,
        now_s: float,
        *,
        lacks_room: bool,
    ) -> None:
        assert request.num_pending_tokens == 0, "what it sampled before it was preempted is read"
        if request.status is RequestStatus.WAITING:
            num_prompt = len(request.prompt_ids)
            self._queue.charge(request.client_key, prompt_tokens=num_prompt)
            self._num_prompt_tokens += num_prompt
            request.admitted_s = now_s
            num_left = num_prompt - (hit.stop if hit else 0)
            recompute_s = self._prefill_s(num_prompt, num_left)
            self._cache.note_admission(request, hit, recompute_s, lacks_room=lacks_room)
        request.row = self._free_rows.pop()
        request.prefill_until = request.num_known_tokens
        request.status = RequestStatus.RUNNING
        self._layout.place(request.row, num_tokens)
        if hit is not None:
            self._cache.take(request, hit)
        insort(self._running, request, key=attrgetter("urgency"))

    def _prefill_s(self, num_tokens: int, num_last: int) -> float:
        """How long the last of so many prompt tokens take on an idle machine."""
        return self._compute_s(num_tokens - num_last, num_tokens)

    def _compute_s(self, start: int, stop: int) -> float:
        num_tokens = stop - start
        pairs = prefill_pairs(start, num_tokens)
        return self._cost_model.forecast_s(StepFeatures(num_tokens, prefill_pairs=pairs))

    def _catch_up(self, loads: LoadPlan) -> None:
        """Take over what others have computed meanwhile, and what was too much for one step."""
        for request in self._running:
            hit = self._cache.find(request) if request.is_prefilling else None
            if (part := self._part_of(hit, request, loads)) is not None:
                num_prompt = len(request.prompt_ids)
                recompute_s = self._prefill_s(num_prompt, max(1, num_prompt - part.stop))
                is_last = request not in loads.unfinished
                self._cache.note_catching_up(request, part, recompute_s, is_last=is_last)
                self._cache.take(request, part)

    def _part_of(self, hit: Hit | None, request: Request, loads: LoadPlan) -> Hit | None:
        """What the request takes of a hit in this step, if any; the next ones take the rest."""
        if hit is None:
            return None
        self._cache.use(hit)
        return loads.cut(request, hit)

    def _choose_chunks(self, decode: StepFeatures, loads: LoadPlan) -> list[tuple[Request, int]]:
        prefilling = [r for r in self._running if r.is_prefilling and r not in loads.unfinished]
        computing = self._waits.computing(prefilling)
        points = {request: self._cache.next_state_point(request) for request in computing}
        ends = {request: point for request, point in points.items() if point is not None}
        costs, num_loaded = self._cost_model, loads.num_tokens
        plan = PrefillPlan(self._limits, costs, decode, self._ramp_tokens, num_loaded)
        chunks = plan.share_out(computing, ends)
        num_tokens = sum(num_tokens for _, num_tokens in chunks)
        self._waits.others_compute(num_tokens)
        self._num_prefill_tokens += num_tokens
        had = num_tokens if decode.rows else 0
        self._ramp_tokens = max(self._limits.first_chunk_tokens, had + had // 2)
        return chunks

    def _make_plan(
        self,
        joined: Sequence[Request],
        decoding: Sequence[Request],
        guesses: Guesses,
        chunks: Sequence[tuple[Request, int]],
    ) -> StepPlan:
        kv_ops = self._layout.settle()
        saves, loads = self._cache.finish()
        self._num_steps += 1
        locate = self._layout.location
        works = [(r, decode_work(r, locate(r.held_row), guesses.get(r, ()))) for r in decoding]
        works += [(r, chunk_work(r, locate(r.held_row), num_tokens)) for r, num_tokens in chunks]
        plan = StepPlan(
            step=self._num_steps,
            left_rows=tuple(self._left_rows),
            joined_rows=tuple(map(joined_row, joined)),
            kv_ops=kv_ops,
            decodes=by_place(work for _, work in works if work.token_ids is None),
            chunks=by_place(work for _, work in works if work.token_ids is not None),
            saves=saves,
            loads=loads,
        )
        self._in_flight[plan.step] = {w.row: request for request, w in works if w.yields}
        for request, work in works:
            self._advance(request, work)
        self._forecast_step_s = self._cost_model.forecast_s(StepFeatures.of(plan))
        return plan

    def _advance(self, request: Request, work: RowWork) -> None:
        """Count the work's tokens as computed and what it yields as pending."""
        request.num_computed_tokens = work.end
        request.num_pending_tokens += work.yields
        self._layout.set_num_tokens(work.row, work.end)
        if work.yields <= 1:  # else it may have to go back
            self._cache.computed(request)

    # ---- read a step

    def update(self, plan: StepPlan, result: StepResult, now_s: float) -> list[RequestOutput]:
        """Take in what rows of a plan yielded; each row comes once."""
        in_flight = self._in_flight[plan.step]
        planned = {work.row: work for work in plan.works if work.row in result}
        outputs = []
        for row, given in result.items():
            request, work = in_flight.pop(row), planned[row]
            request.num_pending_tokens -= work.yields
            if request.status is not RequestStatus.FINISHED:
                num_taken = request.num_taken(given.token_ids)
                if work.yields > 1:
                    self._go_back(request, work, work.yields - num_taken)
                outputs.append(self._append_tokens(request, given, num_taken, now_s))
        return outputs

    def end_step(self, plan: StepPlan, step_s: float | None) -> None:
        """Every row of the plan has come. `step_s` is how long the step took, None where that
        would teach nothing (a first, compiling step)."""
        assert not self._in_flight.pop(plan.step), "a row of the plan has not come"
        if step_s is not None and plan.works:
            self._cost_model.observe(StepFeatures.of(plan), step_s)

    def _go_back(self, request: Request, work: RowWork, num_tokens: int) -> None:
        """Take back so many tokens at the end of what the row computed, if it has it still."""
        if request.row == work.row and request.num_computed_tokens == work.end:
            request.num_computed_tokens -= num_tokens
            self._layout.set_num_tokens(work.row, request.num_computed_tokens)
            self._cache.computed(request)

    def _append_tokens(
        self, request: Request, given: RowResult, num_tokens: int, now_s: float
    ) -> RequestOutput:
        """Take the first tokens that a row yielded; the others come after the request's end."""
        queue_s = prefill_s = 0.0
        report = None
        if not request.output_ids:
            request.first_token_s = now_s
            report = self._cache.report_of(request)
            admitted_s = now_s if request.admitted_s is None else request.admitted_s
            queue_s, prefill_s = admitted_s - request.arrival_s, now_s - admitted_s
        token_ids = list(given.token_ids[:num_tokens])
        request.output_ids += token_ids
        reason = request.reason_to_end
        self._num_output_tokens += num_tokens
        self._queue.charge(request.client_key, output_tokens=num_tokens)
        if reason is not None:
            self._finish(request, reason)
        return RequestOutput(
            req_id=request.req_id,
            token_ids=token_ids,
            finish_reason=reason,
            queue_s=queue_s,
            cache=report,
            logprobs=None if given.logprobs is None else given.logprobs[:num_tokens],
            prompt_logprobs=given.prompt_logprobs,
            prefill_s=prefill_s,
            num_preemptions=request.num_preemptions,
        )

    # ---- what is going on

    @property
    def geometry(self) -> KVGeometry:
        return self._layout.geometry

    @property
    def has_work(self) -> bool:
        """Unfinished requests, rows that leave, a cache that is to shrink, or something to give to
        the tier."""
        has_rows = bool(self._requests or self._departures)
        return has_rows or self._cache.is_too_large or self._cache.has_offloads_due

    @property
    def waits_for_tier(self) -> bool:
        """All that there is to do is to wait for the tier."""
        return 0 < len(self._requests) == self._cache.num_waiting

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + self._cache.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that have a row or wait for their last token only."""
        return len(self._requests) - self.num_waiting

    @property
    def has_offloads(self) -> bool:
        """Whether something is meant for the tier, even where it has no room now."""
        return self._cache.has_offloads

    @property
    def num_restored_tokens(self) -> int:
        return self._cache.numbers.num_restored_tokens

    def offload_all(self) -> None:
        """Before the engine ends: give the tier what only memory has, in the plans that follow."""
        self._cache.offload_all()

    def hold_cache(self, share: float) -> None:
        """Lets the prefix cache keep such a share of what it has, from the next plans on; 1 lets it
        grow again. A later share is of what it had at the first."""
        self._cache.hold(share)

    def stats(self, peak_memory_bytes: int = 0) -> EngineStats:
        decoding = [request for request in self._running if not request.is_prefilling]
        cached = self._cache.numbers
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_used_bytes=self._layout.used_bytes,
            kv_limit_bytes=self._layout.limit_bytes,
            kv_live_tokens=self._layout.live_tokens,
            num_steps_total=self._num_steps,
            num_preemptions_total=self._num_preemptions,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_output_tokens,
            forecast_step_s=self._forecast_step_s,
            prefill_tokens_per_s=self._cost_model.prefill_tokens_per_s(
                self._limits.max_num_batched_tokens
            ),
            decode_tokens_per_s=self._cost_model.decode_tokens_per_s(
                len(decoding), sum(request.num_computed_tokens for request in decoding)
            ),
            peak_memory_bytes=peak_memory_bytes,
            kv_cached_bytes=cached.used_bytes,
            num_cached_blocks=cached.num_blocks,
            num_free_blocks=cached.num_free_blocks,
            prefix_cache_queries_total=cached.num_queried_tokens,
            prefix_cache_hits_total=cached.num_hit_tokens,
            cache_evictions_total=cached.num_evictions,
            prefill_tokens_total=self._num_prefill_tokens,
            num_deferred=self._cache.num_waiting,
        )


def _features_of(decoding: Sequence[Request], guesses: Guesses) -> StepFeatures:
    kv_tokens = sum(request.num_computed_tokens + 1 for request in decoding)
    features = StepFeatures(rows=len(decoding), kv_tokens=kv_tokens)
    for request, ids in guesses.items():
        features = features.with_chunk(request.num_computed_tokens + 1, len(ids))
    return features
