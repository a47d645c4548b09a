"""What a request is told about the cache is true, whatever its length and wherever texts part."""

from __future__ import annotations

from itertools import takewhile

import pytest
from scheduler_sim import Simulation

from mlx_lm_server.core.cache_reports import DIFFERS, ENDS, LACKS_ROOM
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.protocol import CacheReport, SamplingParams

BLOCK = 16
SETTINGS = CacheSettings(block_size=BLOCK, segment_bytes=2 * BLOCK)
FULL = KVGeometry(1)
NOTHING = "nothing that begins like this is cached"


class Server:
    """Requests one after the other, and the texts that they leave behind."""

    def __init__(self, geometry: KVGeometry = FULL, limit_tokens: int = 1 << 20) -> None:
        limits = SchedulerLimits(max_batch_size=4, lookahead_tokens=0)
        self.sim = Simulation(limits, limit_tokens, cache=SETTINGS, geometry=geometry)
        self.texts: list[tuple[int, ...]] = []

    def ask(self, prompt: tuple[int, ...], max_tokens: int = 3) -> CacheReport:
        name = f"r{len(self.texts)}"
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        self.sim.add(Request(req_id=name, prompt_ids=prompt, sampling=sampling))
        self.sim.run()
        outputs = self.sim.outputs[name]
        ids = [token for output in outputs for token in output.token_ids]
        self.texts.append((*prompt, *ids[:-1]))  # the last token is never computed
        [report] = [output.cache for output in outputs if output.cache]
        return report


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def check(report: CacheReport, prompt: tuple[int, ...], texts: list[tuple[int, ...]]) -> None:
    """Each claim that the report makes, against all texts that were cached when it was made."""
    nearest, why = report.num_nearest_tokens, report.why
    assert nearest == max((common(text, prompt) for text in texts), default=0)
    assert (why == "") == (report.num_cached_tokens >= len(prompt) - 1)
    assert "memory" not in why
    beside = [text for text in texts if common(text, prompt) == nearest]
    if "nothing that begins" in why:
        assert nearest == 0
    if "not longer than a block" in why:
        assert len(prompt) <= BLOCK
    if DIFFERS in why:
        assert nearest < len(prompt)
        assert any(len(text) > nearest for text in beside)
        shown = tuple(report.nearest_ids)
        assert any(text[nearest : nearest + len(shown)] == shown for text in beside)
    if ENDS in why:
        assert any(len(text) == nearest for text in beside)
    if "nothing less than a block" in why:
        assert nearest < BLOCK
        assert report.num_cached_tokens == 0


@pytest.mark.parametrize("num_tokens", range(1, 41))
def test_a_prompt_that_comes_twice(num_tokens: int) -> None:
    prompt = tuple(range(100, 100 + num_tokens))
    server = Server()
    check(server.ask(prompt), prompt, [])
    report = server.ask(prompt)
    check(report, prompt, server.texts[:1])
    if 1 < num_tokens <= BLOCK:
        assert report.num_cached_tokens == 0
        assert f"not longer than a block ({BLOCK} tokens)" in report.why
    else:
        assert report.num_cached_tokens == num_tokens - 1
        assert report.why == ""


@pytest.mark.parametrize("num_shared", range(41))
def test_a_prompt_that_leaves_a_text_or_outlasts_it(num_shared: int) -> None:
    shared = tuple(range(100, 100 + num_shared))
    for first, then in (
        ((*shared, *range(200, 230)), (*shared, *range(300, 330))),  # they part
        (shared or (1,), (*shared, *range(300, 330))),  # after the answer of the first
    ):
        server = Server()
        server.ask(first)
        report = server.ask(then)
        check(report, then, server.texts[:1])
        assert report.num_cached_tokens == (num_shared if num_shared >= BLOCK else 0)
        assert report.why


def test_a_prompt_that_goes_on_where_a_text_ends() -> None:
    server = Server()
    server.ask(tuple(range(100, 130)))
    prompt = (*server.texts[0], 300, 301)
    report = server.ask(prompt)
    check(report, prompt, server.texts[:1])
    assert report.why == ENDS


def test_a_short_text_that_ends_is_no_block() -> None:
    server = Server()
    server.ask(tuple(range(100, 106)))
    prompt = (*server.texts[0], *range(300, 330))
    assert (
        server.ask(prompt).why == f"{ENDS}, and nothing less than a block (16 tokens) is taken up"
    )


@pytest.mark.parametrize("num_alike", [35, 43, 50])
def test_a_prompt_that_goes_on_like_a_row_in_work(num_alike: int) -> None:
    """The row's text is known beyond its last full block, and so is where it parts from that."""
    sim = Simulation(SchedulerLimits(max_batch_size=4), cache=SETTINGS)
    text = tuple(range(100, 150))
    sampling = SamplingParams(max_tokens=30, seed=1)
    first = Request(req_id="first", prompt_ids=text, sampling=sampling)
    sim.add(first)
    for _ in range(4):
        sim.step()
    prompt = (*text[:num_alike], 300, 301, 302)
    other = Request(req_id="other", prompt_ids=prompt, sampling=sampling)
    sim.add(other)
    sim.step()
    report = sim.report_of("other")
    assert report.num_cached_tokens == report.num_nearest_tokens == num_alike
    assert report.why == DIFFERS
    known = (*text, *first.output_ids)[num_alike:]
    assert 0 < len(report.nearest_ids) <= len(known)
    assert tuple(report.nearest_ids) == known[: len(report.nearest_ids)]


def test_memory_is_named_where_it_is_short() -> None:
    server = Server(limit_tokens=224)
    prompt = tuple(range(100, 200))
    server.ask(prompt)
    report = server.ask((*prompt, *range(300, 350)))
    assert report.num_cached_tokens == 0
    assert report.why == LACKS_ROOM


def test_what_was_found_and_left_to_later_steps_is_no_want_of_memory() -> None:
    server = Server()
    prompt = tuple(range(100, 200))
    server.ask(prompt)
    request = Request(req_id="x", prompt_ids=prompt, sampling=SamplingParams(max_tokens=1, seed=1))
    server.sim.cache.enter(request, lambda start, stop: 1.0)
    hit = server.sim.cache.find(request)
    assert hit is not None
    for num_tokens, words in ((32, "left to later steps"), (96, "less than a block")):
        server.sim.cache.note_admission(request, hit.within(num_tokens), 0.0)
        report = server.sim.cache.report_of(request)
        assert report is not None
        assert words in report.why


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (KVGeometry(1, bytes_per_row=20), "taken up only at checkpoints"),
        (KVGeometry(0, bytes_per_row=30), "no checkpoint of the model's state is kept further on"),
    ],
    ids=["blocks and state", "state alone"],
)
def test_models_with_state_name_their_checkpoints(geometry: KVGeometry, words: str) -> None:
    server = Server(geometry)
    prompt = tuple(range(100, 200))
    server.ask(prompt)
    assert words in server.ask((*prompt[:50], *range(300, 330))).why
    short = prompt[:10]
    assert "not longer than a block" in server.ask(short).why
