"""Which steps are submitted before the last has ended, by what was measured."""

from __future__ import annotations

from dataclasses import replace

from mlx_lm_server.core.submitting import (
    NEVER,
    RESERVED_PART,
    UNBOUNDED,
    EarlySteps,
    Submitting,
    Trial,
    early_steps,
)

MIB = 1 << 20
STEP_S = 0.010


def trial(slab_bytes: int, early_s: float, copies: float = 1.0) -> Trial:
    peak_bytes = MIB + int(copies * slab_bytes)
    return Trial(slab_bytes, STEP_S, early_s, MIB, peak_bytes)


def measured(small_s: float, large_s: float, copies: float = 1.0) -> Submitting:
    return Submitting(trial(MIB, small_s, copies), trial(101 * MIB, large_s, copies))


def test_where_waiting_costs_nothing_steps_are_late() -> None:
    assert measured(0.010, 0.012).early_slab_bytes is None
    assert measured(0.0099, 0.0101).early_slab_bytes is None, "as much as two runs differ by"


def test_the_bound_is_where_both_take_equally_long() -> None:
    assert measured(0.009, 0.014).early_slab_bytes == 21 * MIB
    assert measured(0.008, 0.012).early_slab_bytes == 51 * MIB


def test_nothing_larger_than_what_was_tried_is_submitted_early() -> None:
    assert measured(0.008, 0.008).early_slab_bytes == 101 * MIB
    assert measured(0.008, 0.010).early_slab_bytes == 101 * MIB


def test_who_copies_more_than_is_counted_is_never_early() -> None:
    assert measured(0.008, 0.008, copies=2.0).early_slab_bytes is None
    assert measured(0.008, 0.008, copies=0.0).early_slab_bytes == 101 * MIB


def test_late_steps_that_copy_are_told() -> None:
    seen = measured(0.008, 0.012)
    assert seen.writes_in_place
    assert "late ones write in place" in seen.describe()
    copied = Trial(101 * MIB, STEP_S, 0.012, 100 * MIB, 100 * MIB)
    seen = Submitting(trial(MIB, 0.008), copied)
    assert not seen.writes_in_place
    assert "NOT in place" in seen.describe()


def test_where_nothing_is_copied_though_the_device_is_behind_all_steps_are_early() -> None:
    large = Trial(101 * MIB, 2 * STEP_S, 2 * STEP_S - 0.002, MIB, 2 * MIB)
    seen = Submitting(trial(MIB, 0.008), large)
    assert not seen.copies_early
    early = early_steps(seen, 7, 320 * MIB, 100)
    assert early == EarlySteps(UNBOUNDED, 100, 7)
    assert early.describe() == "early"
    is_as_fast = replace(large, late_s=STEP_S, early_s=0.008)
    assert Submitting(seen.small, is_as_fast).copies_early, "the device may have been idle"


def test_a_model_without_slabs_may_gain_too() -> None:
    early = early_steps(Submitting(trial(0, 0.008), trial(0, 0.008)), 10, 1 << 20, 64)
    assert early.reserve_bytes == 10
    assert early.allow(0, 64)
    assert not early.allow(0, 65)


def test_copies_are_counted_and_take_a_share_of_what_is_free() -> None:
    free_bytes, other_bytes = 320 * MIB, MIB
    early = early_steps(measured(0.009, 0.034), other_bytes, free_bytes, 100)
    assert (early.max_slab_bytes, early.reserve_bytes) == (5 * MIB, 6 * MIB)
    early = early_steps(measured(0.008, 0.008), other_bytes, free_bytes, 100)
    assert early.reserve_bytes == free_bytes // RESERVED_PART
    assert early.max_slab_bytes == early.reserve_bytes - other_bytes
    assert early_steps(measured(0.008, 0.008), 21 * MIB, free_bytes, 100) == NEVER
    assert early_steps(measured(0.010, 0.008), 0, free_bytes, 100) == NEVER


def test_it_is_said_which_steps_are_early() -> None:
    assert NEVER.describe() == "late"
    assert not NEVER.allow(0, 1)
    early = EarlySteps(5 * MIB, 100)
    assert early.describe() == "early over slabs of up to 5 MiB, else late"
