"""Stop strings and logprobs belong to the text that the client gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_lm_server.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.parsing.tool_formats.format import ToolSchemas
from mlx_lm_server.protocol import FinishReason, SamplingParams, TokenLogprobs
from mlx_lm_server.server.answers.answer_reader import AnswerReader
from mlx_lm_server.server.answers.generate_request import Answer, Delta, GenerateRequest
from mlx_lm_server.server.models.tokenizer import Tokenizer
from mlx_lm_server.server.protocols.openai.logprobs import completion_logprobs

END = 0  # the model's end token, without a text
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANSWER = AnswerFormat(
    REASONING_FORMATS["think"], TOOL_FORMATS["hermes"], schemas=ToolSchemas([TOOL])
)
CALL = '<tool_call>{"name": "f", "arguments": {"a": "x\\n\\ny"}}</tool_call>'


class Letters:
    """Each letter is a token, and its id is its code point."""

    special_ids = frozenset({END})

    def detokenizer(self, visible_ids: frozenset[int]) -> Letters:
        return self

    def push(self, ids: Iterable[int]) -> str:
        return "".join(chr(i) for i in ids if i != END)

    def flush(self) -> str:
        return ""

    def bytes_of(self, token_id: int) -> bytes:
        return b"<end>" if token_id == END else chr(token_id).encode()


class Words(Letters):
    """Tokens of several letters, by their ids."""

    def __init__(self, *words: str | bytes) -> None:
        self._bytes = [word.encode() if isinstance(word, str) else word for word in words]
        self._held = b""

    def push(self, ids: Iterable[int]) -> str:
        self._held += b"".join(self._bytes[i] for i in ids)
        try:
            text, self._held = self._held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id]


def request(
    *,
    stops: Sequence[str] = (),
    answer: AnswerFormat | None = ANSWER,
    sampling: dict[str, Any] | None = None,
    **more: Any,
) -> GenerateRequest:
    params = {"max_tokens": 10**6, "seed": 0, "logprobs": 0, "stop_token_ids": (END,)}
    return GenerateRequest(
        more.pop("prompt_ids", [1]),
        SamplingParams(**{**params, **(sampling or {})}),
        tuple(stops),
        answer=answer,
        **more,
    )


def scores(ids: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(-float(i), [], []) for i in ids]


def deltas(
    asked: GenerateRequest,
    ids: Sequence[int],
    sizes: Sequence[int] = (1,),
    reason: FinishReason = "length",
    tokenizer: Letters | None = None,
) -> tuple[list[Delta], AnswerReader]:
    """What comes of the ids, which the engine sends in groups of these sizes."""
    reader = AnswerReader(0, asked, cast(Tokenizer, tokenizer or Letters()))
    found: list[Delta] = []
    place, number = 0, 0
    while not found or found[-1].finish_reason is None:
        size = sizes[number % len(sizes)]
        group = list(ids[place : place + size])
        place, number = place + size, number + 1
        end = reason if place >= len(ids) else None
        delta = reader.read_scored(group, end, scores(group), None)
        if delta is not None:
            found.append(delta)
    return found, reader


def said(asked: GenerateRequest, text: str, sizes: Sequence[int] = (1,), **more: Any) -> Answer:
    answer = Answer()
    for delta in deltas(asked, list(map(ord, text)), sizes, **more)[0]:
        answer.add(delta)
    return answer


def tokens_of(answer: Answer) -> str:
    return "".join(chr(token.token_id) for token in answer.tokens or ())


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Letter by letter: where the text ends, and before which of them."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return end - max(map(len, found)), max(found, key=len)
    return None


PIECES = ("<think>", "</think>", CALL, "<tool_call>", "<", "a", "b", "ab ", "\n", "\n\n", " ", "b<")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
STOPS = st.lists(
    st.sampled_from(("\n", "\n\n", "ab", "b", "a\n", "<", "b<t", " a", "x")), min_size=1, max_size=3
)
PLAIN = st.lists(st.sampled_from(("a", "b", "ab ", "\n", "\n\n", " ", "b<", "t")), max_size=6)
THOUGHTS = PLAIN.map(lambda pieces: ["<think>", *pieces, "</think>", "\n\n"])
MESSAGES = st.tuples(st.just([]) | THOUGHTS, PLAIN, st.just([]) | st.just(["\n", CALL]), PLAIN).map(
    lambda parts: [piece for part in parts for piece in part]
)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(TEXTS, STOPS, SIZES, st.booleans())
@example("ab\n<tool_call>", ["b\n"], [1], False)
@example("a\n\nb", ["\n\n"], [1], False)
def test_the_content_ends_at_the_first_stop_string_in_it(
    text: str, stops: list[str], sizes: list[int], keeps: bool
) -> None:
    """Whatever parser, borders and groups of tokens do: the content is that without stop strings,
    cut where it has the first one."""
    free = said(request(), text, sizes)
    answer = said(request(stops=stops, keeps_stop=keeps), text, sizes)
    found = first_stop(free.text, stops)
    if found is None:
        assert answer.text == free.text
        assert (answer.finish_reason, answer.stop_reason) == (free.finish_reason, None)
        assert [call[1:] for call in answer.calls] == [call[1:] for call in free.calls]
        assert tokens_of(answer) == text
    else:
        start, stop = found
        assert answer.text == free.text[: start + len(stop) * keeps]
        assert answer.stop_reason == stop
        assert answer.finish_reason == ("tool_calls" if answer.calls else "stop")
    assert free.reasoning.startswith(answer.reasoning)


@given(TEXTS, STOPS, SIZES, st.integers(0, 12), st.booleans(), st.booleans())
def test_however_the_tokens_are_grouped_the_same_comes_out(
    text: str, stops: list[str], sizes: list[int], min_tokens: int, thinks: bool, is_plain: bool
) -> None:
    asked = request(
        stops=stops,
        sampling={"min_tokens": min_tokens},
        stops_reasoning=thinks,
        answer=None if is_plain else ANSWER,
    )
    ids = list(map(ord, text))
    found = []
    for groups in ([1], sizes, [10**6]):
        answer, (parts, reader) = said(asked, text, groups), deltas(asked, ids, groups)
        calls = [call[1:] for call in answer.calls]
        found.append(
            [
                *(answer.text, answer.reasoning, calls, answer.finish_reason, answer.stop_reason),
                *(tokens_of(answer), reader.num_tokens, reader.num_reasoning_tokens),
            ]
        )
        assert parts[-1].finish_reason is not None
    assert found[0] == found[1] == found[2]


@given(MESSAGES, STOPS, st.booleans(), st.booleans())
def test_tokens_of_several_letters_say_the_same(
    pieces: list[str], stops: list[str], thinks: bool, keeps: bool
) -> None:
    """And the logprobs are those of the tokens that begin before the text's end."""
    asked = request(stops=stops, stops_reasoning=thinks, keeps_stop=keeps)
    by_letter = said(asked, "".join(pieces))
    answer = Answer()
    words = ("<end>", *pieces)
    for delta in deltas(asked, range(1, len(words)), tokenizer=Words(*words))[0]:
        answer.add(delta)
    assert (answer.text, answer.reasoning) == (by_letter.text, by_letter.reasoning)
    assert [call[1:] for call in answer.calls] == [call[1:] for call in by_letter.calls]
    assert answer.stop_reason == by_letter.stop_reason
    shown = "".join(words[token.token_id] for token in answer.tokens or ())
    letters = tokens_of(by_letter)
    assert shown.startswith(letters)
    last = words[answer.tokens[-1].token_id] if answer.tokens else ""
    assert len(shown) - len(letters) < max(len(last), 1)


@given(st.text("ab<\n ", max_size=20), STOPS, SIZES, st.booleans(), st.booleans())
def test_the_tokens_are_those_of_the_text_and_come_with_it(
    text: str, stops: list[str], sizes: list[int], is_plain: bool, keeps: bool
) -> None:
    asked = request(stops=stops, answer=None if is_plain else ANSWER, keeps_stop=keeps)
    whole, shown = "", ""
    for delta in deltas(asked, list(map(ord, text)), sizes)[0]:
        whole += delta.text
        shown += "".join(chr(token.token_id) for token in delta.tokens or ())
        assert shown == whole
    found = first_stop(text, stops)
    if found is not None:
        text = text[: found[0] + len(found[1]) * keeps]
    assert whole == text


def test_reasoning_its_marks_and_calls_hide_no_stop_string_and_are_none() -> None:
    text = f"<think>\nhm\n\nyes\n</think>\n\n3 + 4\n\n{CALL}"
    answer = said(request(stops=["\n\n", "\n", "think"]), text)
    assert (answer.reasoning, answer.text) == ("hm\n\nyes", "3 + 4")
    assert len(answer.calls) == 1
    assert (answer.finish_reason, answer.stop_reason) == ("length", None)
    assert said(request(stops=["\n\n"]), text, reason="stop").finish_reason == "tool_calls"


def test_a_stop_string_in_the_content_ends_it_before_the_call() -> None:
    answer = said(request(stops=["ENOUGH"]), f"Well. ENOUGH {CALL}", [10**6])
    assert (answer.text, answer.calls, answer.finish_reason) == ("Well. ", [], "stop")


def test_stop_strings_end_reasoning_where_that_is_wanted() -> None:
    text = "<think>a\n\nb</think>c"
    answer = said(request(stops=["\n\n"], stops_reasoning=True), text)
    assert (answer.reasoning, answer.text, answer.stop_reason) == ("a", "", "\n\n")
    assert tokens_of(answer) == "<think>a"
    assert said(request(stops=["\n\n"]), text).text == "c"


def test_what_reasoning_holds_back_comes_before_the_content() -> None:
    asked = request(stops=["User:"], stops_reasoning=True)
    parts, _ = deltas(asked, list(map(ord, "<think>the User</think>c")))
    kinds = [bool(part.text) for part in parts if part.text or part.message]
    assert kinds == sorted(kinds)


def test_a_stop_string_that_came_too_early_is_none() -> None:
    asked = request(stops=["\n\n"], sampling={"min_tokens": 3})
    assert said(asked, "a\n\nb\n\nc").text == "a\n\nb"
    plain = request(stops=["\n\n"], sampling={"min_tokens": 3}, answer=None)
    assert said(plain, "a\n\nb\n\nc").text == "a\n\nb"


def test_reasoning_can_be_left_out_and_is_counted() -> None:
    words = Words("<think>", "hm", "</think>", "yes")
    parts, reader = deltas(request(hides_reasoning=True), range(4), tokenizer=words)
    assert "".join(part.text for part in parts) == "yes"
    assert all(part.message is None for part in parts)
    assert reader.num_reasoning_tokens == 3
    assert [token.token_id for part in parts for token in part.tokens or ()] == [3]


def test_a_token_that_the_cut_goes_through_counts_and_those_behind_it_do_not() -> None:
    words = Words("one", " two, ST", "OP", " more")
    for answer in (None, ANSWER):
        asked = request(stops=["STOP"], answer=answer)
        parts, reader = deltas(asked, range(4), tokenizer=words)
        assert "".join(part.text for part in parts) == "one two, "
        assert [t.token_id for part in parts for t in part.tokens or ()] == [0, 1]
        assert reader.num_tokens == 3


def test_a_stop_token_has_its_text_where_that_is_wanted() -> None:
    words = Words("a", "END", "b")
    for keeps, text in ((False, "a"), (True, "aEND")):
        asked = request(
            sampling={"stop_token_ids": (1,)}, keeps_stop=keeps, stop_token_ids=frozenset({1})
        )
        parts, _ = deltas(asked, [0, 1], reason="stop", tokenizer=words)
        assert "".join(part.text for part in parts) == text
        assert parts[-1].stop_reason == 1
        assert sum(len(part.tokens or ()) for part in parts) == 1 + keeps


def test_the_models_own_end_token_is_no_stop_reason() -> None:
    parts, _ = deltas(request(), [ord("a"), END], reason="stop")
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", None)


def test_ids_are_told_once_and_are_those_that_were_counted() -> None:
    asked = request(stops=["c"], prompt_ids=[7, 8], returns_token_ids=True, returns_prompt_ids=True)
    parts, reader = deltas(asked, list(map(ord, "abcd")), [2])
    assert [part.prompt_token_ids for part in parts] == [[7, 8], None]
    ids = [i for part in parts for i in part.token_ids or ()]
    assert "".join(map(chr, ids)) == "abc"
    assert len(ids) == reader.num_tokens


@pytest.mark.parametrize("sizes", [[1], [2], [10]])
def test_offsets_are_places_in_the_text(sizes: list[int]) -> None:
    words = Words("a", "\U0001f94a".encode()[:2], "\U0001f94a".encode()[2:], "bc", "d")
    parts, _ = deltas(request(answer=None), range(5), sizes, tokenizer=words)
    tokens = [token for part in parts for token in part.tokens or ()]
    found = completion_logprobs(tokens, words)
    assert found["text_offset"] == [0, 1, 1, 2, 4]


def test_offsets_of_an_echo_pass_over_what_the_tokenizer_added() -> None:
    words = Words("<s>", " The", " sun", "!")
    asked = request(
        answer=None, prompt_ids=[0, 1, 2], echo="The sun", sampling={"prompt_logprobs": 0}
    )
    reader = AnswerReader(0, asked, cast(Tokenizer, words))
    delta = reader.read_scored([3], "length", scores([3]), scores([1, 2]))
    assert delta is not None
    assert delta.text == "The sun!"
    assert [token.offset for token in delta.tokens or ()] == [0, 0, 3, 7]


def test_the_drawn_token_is_always_among_the_likeliest() -> None:
    words = Words("a", "b", "c")
    asked = request(answer=None)
    reader = AnswerReader(0, asked, cast(Tokenizer, words))
    delta = reader.read_scored([2], "length", [TokenLogprobs(-5.0, [0], [-0.5])], None)
    assert delta is not None
    found = completion_logprobs(delta.tokens or (), words)
    assert found["top_logprobs"] == [{"a": -0.5, "c": -5.0}]
