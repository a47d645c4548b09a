from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.parsing.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab🥊", max_size=14)
STOPS = st.lists(st.text(alphabet="ab🥊", min_size=1, max_size=4), min_size=1, max_size=3)


def said(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = "".join(map(matcher.push, pieces))
    return text + ("" if matcher.is_stopped else matcher.flush()), matcher.is_stopped


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 20)))
def test_however_the_text_is_cut_the_same_comes_out(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert said(cut(text, places), stops) == said(list(text), stops)


@given(LETTERS, STOPS, st.lists(st.integers(0, 20)))
def test_what_comes_out_is_the_text_before_the_first_stop_and_holds_none(
    text: str, stops: list[str], places: list[int]
) -> None:
    out, is_stopped = said(cut(text, places), stops)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert is_stopped == any(stop in text for stop in stops)
    if not is_stopped:
        assert out == text


@given(LETTERS, STOPS)
def test_only_what_could_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    sent = "".join(map(matcher.push, text))
    if not matcher.is_stopped:
        held = text[len(sent) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert said(["abcd"], ["abcd", "c"]) == ("ab", True)


def test_of_two_that_end_together_the_longer_one_cuts() -> None:
    assert said(["xabc"], ["c", "abc"]) == ("x", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings(()).push("anything") == "anything"


def test_after_a_stop_nothing_comes() -> None:
    matcher = StopStrings(["b"])
    assert matcher.push("ab") == "a"
    assert matcher.push("cd") == ""
    assert matcher.flush() == ""


@given(LETTERS, STOPS, st.lists(st.integers(0, 20)))
def test_it_tells_what_it_found_and_how_much_is_missing(
    text: str, stops: list[str], places: list[int]
) -> None:
    matcher, sent, given = StopStrings(stops), "", ""
    for piece in cut(text, places):
        given += piece
        sent += matcher.push(piece)
        assert len(sent) + matcher.num_held == len(given)
        if matcher.is_stopped:
            assert given[len(sent) :].startswith(matcher.found or "?")
            break


@given(LETTERS, STOPS, st.lists(st.integers(0, 20)))
def test_a_stop_string_can_be_kept(text: str, stops: list[str], places: list[int]) -> None:
    matcher, dropping = StopStrings(stops, keeps_stop=True), StopStrings(stops)
    kept = "".join(map(matcher.push, cut(text, places)))
    dropped = "".join(map(dropping.push, cut(text, places)))
    assert kept == dropped + (dropping.found or "")
