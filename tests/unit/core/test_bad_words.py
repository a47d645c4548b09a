from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.core.bad_words import BadWords

TOKENS = st.lists(st.integers(0, 2), max_size=10)
WORDS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=4), min_size=1, max_size=3)


@given(TOKENS, WORDS, st.integers(0, 10))
def test_the_last_token_of_a_word_is_forbidden_after_the_others(
    tokens: list[int], words: list[list[int]], num_known: int
) -> None:
    """Whether the row wrote them while it was watched or before it joined."""
    watched = BadWords(words, tokens[:num_known])
    for token in tokens[num_known:]:
        watched.push(token)
    expected = {word[-1] for word in words if tokens[-len(word) + 1 :] == word[:-1]}
    assert set(watched.forbidden) == expected


def test_before_anything_is_written_nothing_is_forbidden() -> None:
    assert BadWords([(1, 2), (1, 2, 3)]).forbidden == []
