from __future__ import annotations

from collections.abc import Iterable

import pytest

from mlx_lm_server.protocol import FinishReason
from mlx_lm_server.server.answers.output_processor import OutputProcessor

STOP_ID = 0


class Letters:
    """Id 1 is a, 2 is b …; what is pushed as 99 comes only with the flush."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        text = ""
        for token_id in ids:
            if token_id == 99:
                self._held = "?"
            else:
                text += chr(ord("a") + token_id - 1)
        return text

    def flush(self) -> str:
        return self._held


def run(
    steps: list[tuple[list[int], FinishReason | None]],
    stops: tuple[str, ...] = (),
    min_tokens: int = 0,
) -> tuple[str, FinishReason | None, int]:
    processor = OutputProcessor(Letters(), stops, (STOP_ID,), min_tokens)
    text, reason = "", None
    for ids, given in steps:
        assert reason is None
        piece, reason = processor.push(ids, given)
        text += piece
    return text, reason, processor.num_tokens


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_tokens_become_text_and_are_counted(stops: tuple[str, ...]) -> None:
    assert run([([1], None), ([2, 3], "length")], stops) == ("abc", "length", 3)


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_a_stop_token_is_counted_and_has_no_text(stops: tuple[str, ...]) -> None:
    assert run([([1, STOP_ID], "stop")], stops) == ("a", "stop", 2)


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_what_the_detokenizer_holds_comes_at_the_end(stops: tuple[str, ...]) -> None:
    assert run([([1, 99], "length")], stops) == ("a?", "length", 2)


def test_a_stop_string_ends_it_and_later_tokens_do_not_count() -> None:
    assert run([([1, 2, 3, 4], None)], ("c",)) == ("ab", "stop", 3)


def test_a_stop_string_ends_nothing_before_more_than_min_tokens_have_come() -> None:
    assert run([([1, 2, 3, 3], None)], ("c",), min_tokens=3) == ("abc", "stop", 4)
    assert run([([1, 2, 3], "length")], ("c",), min_tokens=3) == ("abc", "length", 3)


def test_a_stop_string_across_steps() -> None:
    assert run([([1, 2], None), ([3], None)], ("bc",)) == ("a", "stop", 3)


def test_what_could_have_been_a_stop_string_comes_at_the_end() -> None:
    assert run([([1, 2], None), ([], "length")], ("bc",)) == ("ab", "length", 2)


def test_a_stop_string_that_the_flush_completes() -> None:
    assert run([([1, 99], "length")], ("a?",)) == ("", "stop", 2)
