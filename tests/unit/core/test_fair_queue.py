from __future__ import annotations

from scheduler_sim import make_request

from mlx_lm_server.core.fair_queue import MAX_IDLE_CLIENTS, FairQueue
from mlx_lm_server.core.request import Request, RequestStatus


class Arrivals:
    """Pushes requests and numbers them as they come."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self._count = 0

    def push(self, req_id: str, client: str = "", priority: int = 0) -> Request:
        request = make_request(req_id, 10, 10, client_key=client, priority=priority)
        request.arrival_order = self._count
        self._count += 1
        self.queue.push(request)
        return request

    def serve(self, num_tokens: int = 100) -> str:
        request = self.queue.pop()
        self.queue.charge(request.client_key, prompt_tokens=num_tokens)
        return request.req_id

    def serve_all(self) -> list[str]:
        return [self.serve() for _ in range(len(self.queue))]


def test_one_client_is_served_in_the_order_of_arrival():
    arrivals = Arrivals()
    for name in "abc":
        arrivals.push(name)
    assert arrivals.serve_all() == ["a", "b", "c"]
    assert arrivals.queue.peek() is None


def test_a_higher_priority_number_comes_first():
    arrivals = Arrivals()
    arrivals.push("normal")
    arrivals.push("background", priority=-1)
    arrivals.push("urgent", priority=5)
    assert arrivals.serve_all() == ["urgent", "normal", "background"]


def test_a_preempted_request_waits_at_the_head_of_its_priority():
    arrivals = Arrivals()
    arrivals.push("first")
    arrivals.push("urgent", priority=1)
    back = make_request("back", 10, 10)
    back.arrival_order = 99
    back.status = RequestStatus.PREEMPTED
    arrivals.queue.push(back)
    assert arrivals.serve_all() == ["urgent", "back", "first"]


def test_clients_take_turns_however_many_requests_each_has():
    arrivals = Arrivals()
    for i in range(4):
        arrivals.push(f"a{i}", client="a")
    for i in range(2):
        arrivals.push(f"b{i}", client="b")
    assert arrivals.serve_all() == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_client_with_longer_prompts_has_fewer_turns():
    arrivals = Arrivals()
    for i in range(6):
        arrivals.push(f"a{i}", client="a")
        arrivals.push(f"b{i}", client="b")
    served = []
    for _ in range(6):
        request = arrivals.queue.pop()
        num_tokens = 300 if request.client_key == "a" else 100
        arrivals.queue.charge(request.client_key, prompt_tokens=num_tokens)
        served.append(request)
    assert [r.client_key for r in served].count("a") == 2


def test_an_output_token_counts_twice_a_prompt_token():
    queue = FairQueue()
    queue.charge("a", prompt_tokens=10)
    queue.charge("b", output_tokens=5)
    assert queue.served("a") == queue.served("b") == 10


def test_a_client_that_comes_back_has_no_credit_for_its_pause():
    arrivals = Arrivals()
    for i in range(5):
        arrivals.push(f"a{i}", client="a")
    for _ in range(3):
        arrivals.serve()
    for i in range(3):
        arrivals.push(f"b{i}", client="b")
    assert arrivals.serve_all() == ["a3", "b0", "a4", "b1", "b2"]


def test_a_client_that_was_served_long_ago_has_no_credit_for_its_pause():
    arrivals = Arrivals()
    arrivals.push("b0", client="b")
    arrivals.serve()
    arrivals.push("a0", client="a")
    arrivals.serve(num_tokens=3000)
    for i in (1, 2):
        arrivals.push(f"a{i}", client="a")
        arrivals.push(f"b{i}", client="b")
    assert arrivals.serve_all() == ["a1", "b1", "a2", "b2"]


def test_a_client_that_comes_back_to_an_empty_queue_starts_at_the_level_of_the_last_served():
    arrivals = Arrivals()
    for i in range(5):
        arrivals.push(f"a{i}", client="a")
    arrivals.serve_all()
    arrivals.push("b0", client="b")
    assert arrivals.queue.served("b") == 500


def test_debt_is_not_forgiven_by_a_pause():
    arrivals = Arrivals()
    arrivals.push("a0", client="a")
    arrivals.push("b0", client="b")
    arrivals.serve(num_tokens=1000)
    arrivals.push("a1", client="a")
    arrivals.push("b1", client="b")
    assert arrivals.serve_all() == ["b0", "b1", "a1"]


def test_a_removed_request_is_not_served():
    arrivals = Arrivals()
    arrivals.push("a")
    gone = arrivals.push("b", client="other")
    arrivals.push("c")
    arrivals.queue.remove(gone)
    assert len(arrivals.queue) == 2
    assert arrivals.serve_all() == ["a", "c"]


def test_counters_of_clients_long_gone_do_not_pile_up():
    arrivals = Arrivals()
    for i in range(2 * MAX_IDLE_CLIENTS):
        arrivals.push(f"r{i}", client=f"client {i}")
        arrivals.serve()
    assert len(arrivals.queue._served) <= MAX_IDLE_CLIENTS + 2
