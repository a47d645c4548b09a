"""However an answer is cut into pieces, it says the same; no tag of the reasoning is content."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.parsing.recordings import BROKEN, RECORDINGS, SCHEMAS, THINK, read, tool_answer

from mlx_lm_server.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from mlx_lm_server.parsing.message_parser import AnswerFormat

TEXTS = [(name, text) for name, text, *_ in (*RECORDINGS, *BROKEN)]
FRAGMENTS = (
    *("<think>", "</think>", "<think", "</", ">", "<", "\n", " ", "a", "ß🥊", "word "),
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", ',
        '"arguments": {',
        '"x": "y',
        '"}}',
        "}",
        '"',
    ),
    *("<function=f>", "<parameter=city>", "</parameter>", "</function>", "[", "f(a=1)", "]"),
)


@st.composite
def cuts(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.data(), st.sampled_from(TEXTS), st.booleans())
def test_recordings_say_the_same_however_they_are_cut(
    data: st.DataObject, recording: tuple[str, str], is_cut: bool
) -> None:
    name, text = recording
    whole = read(tool_answer(name), [text], is_cut=is_cut)
    parts = read(tool_answer(name), data.draw(cuts(text)), is_cut=is_cut)
    assert (parts.content, parts.reasoning) == (whole.content, whole.reasoning)
    assert (parts.calls, parts.broken) == (whole.calls, whole.broken)
    assert parts.warnings == whole.warnings


@given(
    st.data(),
    st.sampled_from(sorted(set(TOOL_FORMATS) - {"harmony"})),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.booleans(),
)
def test_any_text_says_the_same_however_it_is_cut(
    data: st.DataObject, name: str, text: str, is_open: bool
) -> None:
    answer = tool_answer(name, is_open=is_open)
    whole, parts = read(answer, [text]), read(answer, data.draw(cuts(text)))
    assert (parts.content, parts.reasoning) == (whole.content, whole.reasoning)
    assert parts.calls == whole.calls


@given(
    st.data(),
    st.sampled_from(sorted(REASONING_FORMATS)),
    st.lists(st.sampled_from(("S", "E", "a", " ", "\n", "<", "[", "x>")), max_size=14),
    st.booleans(),
)
def test_no_tag_is_ever_content_and_no_letter_is_lost(
    data: st.DataObject, name: str, parts: list[str], is_open: bool
) -> None:
    one = REASONING_FORMATS[name]
    marks = {"S": one.start, "E": one.end}
    text = "".join(marks.get(part, part) for part in parts)
    said = read(AnswerFormat(one, schemas=SCHEMAS, is_open=is_open), data.draw(cuts(text)))
    assert one.start not in said.content
    assert one.end not in said.content
    letters = sorted(
        "".join(part for part in parts if part not in marks).replace(" ", "").replace("\n", "")
    )
    assert sorted("".join((said.content + said.reasoning).split())) == letters


@given(st.data(), st.text(max_size=60))
def test_plain_text_passes_as_it_is(data: st.DataObject, text: str) -> None:
    if "think>" not in text:
        assert read(AnswerFormat(THINK), data.draw(cuts(text))).content == text
