"""The end of the reasoning is forced when, and only when, the budget is spent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.core.thinking import ThinkingClock
from mlx_lm_server.protocol import ThinkingBudget

START, END = 1, 2


def said(budget: ThinkingBudget, wanted: list[int]) -> list[int]:
    """What a row says whose model wants these tokens, as long as none is forced."""
    clock, found = ThinkingClock(budget), []
    for token in wanted:
        found.append(token if clock.forced is None else clock.forced)
        clock.push(found[-1])
    return found


def budget(
    max_tokens: int, *, is_open: bool = True, forced: tuple[int, ...] = (END,)
) -> ThinkingBudget:
    return ThinkingBudget(max_tokens, (START,), (END,), forced, is_open)


def test_the_end_comes_after_so_many_tokens() -> None:
    assert said(budget(3), [7, 7, 7, 7, 8]) == [7, 7, 7, END, 8]
    assert said(budget(0), [7, 8]) == [END, 8]


def test_who_ends_in_time_is_left_alone() -> None:
    assert said(budget(3), [7, 7, 7, END, 8, 8, 8, 8]) == [7, 7, 7, END, 8, 8, 8, 8]


def test_it_counts_from_the_start_mark() -> None:
    assert said(budget(1, is_open=False), [8, 8, START, 7, 7, 8]) == [8, 8, START, 7, END, 8]


def test_a_start_of_several_tokens() -> None:
    several = ThinkingBudget(1, (4, 5, 6), (END,), (END, 9), False)
    assert said(several, [4, 5, 4, 5, 6, 7, 7, 7, 8]) == [4, 5, 4, 5, 6, 7, END, 9, 8]


def test_the_budget_is_for_all_reasoning_together() -> None:
    wanted = [7, END, 8, START, 7, 7, 8, START, 7, 8]
    assert said(budget(2), wanted) == [7, END, 8, START, 7, END, 8, START, END, 8]


TOKENS = st.lists(st.integers(0, 9), max_size=40)


@given(TOKENS, st.integers(0, 6), st.booleans(), st.integers(0, 40))
def test_after_a_preemption_it_goes_on(
    wanted: list[int], most: int, is_open: bool, cut: int
) -> None:
    one = budget(most, is_open=is_open, forced=(END, 9))
    whole = said(one, wanted)
    clock = ThinkingClock(one, whole[:cut])
    rest = []
    for token in wanted[cut:]:
        rest.append(token if clock.forced is None else clock.forced)
        clock.push(rest[-1])
    assert whole[:cut] + rest == whole


@given(TOKENS, st.integers(0, 6), st.booleans())
def test_never_more_than_the_budget_is_thought(wanted: list[int], most: int, is_open: bool) -> None:
    num_thought, is_thinking = 0, is_open
    for token in said(budget(most, is_open=is_open), wanted):
        if is_thinking:
            is_thinking = token != END
            num_thought += is_thinking
        else:
            is_thinking = token == START
    assert num_thought <= most
