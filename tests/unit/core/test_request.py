from __future__ import annotations

from mlx_lm_server.core.request import Request, RequestStatus
from mlx_lm_server.protocol import AddRequest, SamplingParams


def _request() -> Request:
    message = AddRequest(
        req_id="a",
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=10, seed=0),
        priority=2,
        client_key="key",
    )
    return Request.from_message(message, arrival_s=5.0)


def test_a_request_is_made_of_its_message():
    request = _request()
    assert (request.req_id, request.prompt_ids, request.priority) == ("a", (1, 2, 3), 2)
    assert (request.client_key, request.arrival_s) == ("key", 5.0)
    assert request.status is RequestStatus.WAITING
    assert request.max_new_tokens == 10


def test_pending_tokens_count_as_tokens_but_are_not_known():
    request = _request()
    request.output_ids += [4, 5]
    request.num_pending_tokens = 1
    assert request.num_known_tokens == 5
    assert request.num_tokens == 6
    assert request.num_tokens_to_plan == 7


def test_known_ids_run_from_the_prompt_into_the_output():
    request = _request()
    request.output_ids += [4, 5]
    assert request.known_ids(0, 3) == (1, 2, 3)
    assert request.known_ids(1, 4) == (2, 3, 4)
    assert request.known_ids(0, 5) == (1, 2, 3, 4, 5)
    assert request.known_ids(4, 5) == (5,)


def test_a_higher_priority_number_is_more_urgent_and_then_the_earlier_arrival():
    early, late, important = _request(), _request(), _request()
    early.arrival_order, late.arrival_order, important.arrival_order = 0, 1, 2
    important.priority = 3
    ordered = sorted([late, important, early], key=lambda request: request.urgency)
    assert ordered == [important, early, late]
