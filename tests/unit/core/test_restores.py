"""What the tier has of a prompt is read in parts, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_sim import FakeTier, Simulation, expected_output, make_request

from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.restores import MAX_PART_BYTES, PARTS_IN_FLIGHT
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.core.tier import Label

BLOCK, NUM_BLOCKS = 16, 40


class TierOfParts(FakeTier):
    """Its reads end one at a time, the first first, or never where it `hangs`.
    What is `lost` cannot be read any more."""

    def __init__(self) -> None:
        super().__init__(0, writes_through=True, is_flaky=False)
        self.most_in_flight = 0
        self.num_cancelled = 0
        self.lost: bytes | None = None
        self.hangs = False

    def size_of(self, name: bytes) -> int:
        return MAX_PART_BYTES // 8

    def fetch(self, labels: Sequence[Label]) -> int:
        read = super().fetch(labels)
        assert len(labels) <= 8
        self.most_in_flight = max(self.most_in_flight, len(self.reads))
        return read

    def cancel(self, read: int) -> None:
        del self.reads[read]
        self.num_cancelled += 1

    def poll(self) -> list[tuple[int, int]]:
        if self.hangs or not self.reads:
            return []
        first = min(self.reads)
        labels = self.reads.pop(first)
        names = [label.name for label in labels]
        if self.lost in names:
            labels = labels[: names.index(self.lost)]
        return [(first, self._find(labels))]


def _filled_tier() -> TierOfParts:
    tier = TierOfParts()
    sim = _simulation(tier)
    sim.add(make_request("before", NUM_BLOCKS * BLOCK + 1, 4))
    sim.run()
    assert len(tier.records) >= NUM_BLOCKS
    return tier


def _simulation(tier: TierOfParts) -> Simulation:
    return Simulation(
        SchedulerLimits(), cache=CacheSettings(block_size=BLOCK, segment_bytes=300), tier=tier
    )


def _run_again(tier: TierOfParts) -> int:
    """How many tokens of the prompt came from the tier; the answer is the same in any case."""
    sim = _simulation(tier)
    sim.add(make_request("after", NUM_BLOCKS * BLOCK + 1, 4))
    sim.run()
    assert sim.tokens_of("after") == expected_output(0, 4)
    assert not tier.reads
    return sim.cache._restores.num_restored_tokens


def test_a_few_parts_are_on_their_way_and_not_more():
    tier = _filled_tier()
    assert _run_again(tier) == NUM_BLOCKS * BLOCK
    assert tier.num_reads == NUM_BLOCKS / 8
    assert tier.most_in_flight == PARTS_IN_FLIGHT
    assert not tier.num_cancelled


def test_what_comes_after_a_part_that_is_short_is_not_read():
    tier = _filled_tier()
    by_place = sorted(tier.records.values(), key=lambda record: record[0].num_tokens)
    tier.lost = by_place[12][0].name
    assert _run_again(tier) == 12 * BLOCK
    assert tier.num_reads == 1 + PARTS_IN_FLIGHT
    assert tier.num_cancelled == PARTS_IN_FLIGHT - 1


def test_a_request_that_the_tier_reads_for_is_told_apart_from_those_without_a_row():
    sim = _simulation(_filled_tier())
    sim.add(make_request("after", NUM_BLOCKS * BLOCK + 1, 4))
    stats = sim.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (1, 1)
    sim.add(make_request("new", 40, 4, seed=9))
    stats = sim.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (2, 1)
    sim.run()
    assert sim.scheduler.stats().num_deferred == 0


def test_a_request_that_decodes_does_not_wait_for_the_tier_that_reads_for_another():
    sim = _simulation(_filled_tier())
    sim.add(make_request("decodes", 10, 50, seed=9, stops=False))
    sim.step()
    sim.add(make_request("after", NUM_BLOCKS * BLOCK + 1, 4))
    assert len(sim.cache._restores) == 1
    assert not sim.scheduler.waits_for_tier
    sim.abort("decodes")
    assert sim.scheduler.waits_for_tier


def test_a_read_that_never_ends_is_waited_for_a_bounded_time_only():
    tier = _filled_tier()
    tier.hangs = True
    sim = _simulation(tier)
    sim.add(make_request("after", NUM_BLOCKS * BLOCK + 1, 4))
    sim.run(max_steps=1000)
    assert sim.tokens_of("after") == expected_output(0, 4)
