"""SentencePiece's own library is the measure: the same ids for any text."""

from __future__ import annotations

import io
import random
import re
import struct
from typing import Any

import pytest
import sentencepiece

from mlx_lm_server.server.models.sentencepiece_file import (
    SentencePieceModel,
    longest_of,
    to_tokenizer,
)

TEXT = (
    "the cat sat on mat a of and hello world 12 345 x=1; foo(bar) Zwölf Boxkämpfer größe naïve "
    "東京 日本語 テスト привет мир aaa aaaa abab"
)
WORDS = TEXT.split()
ODD = [*"ab c  12<>x▁\n\té東テп🥊ﬁÅ", "<u1>", "<0x41>", "   ", "Ａ"]
AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = ["<u1>", "▁▁", "▁▁▁", "\n\n", "\n", "<start>", "ab", "abc"]
KINDS: dict[str, dict[str, Any]] = {
    "as Llama 2": {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, **AS_IT_IS},
    "as Gemma": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": SYMBOLS,
        **AS_IT_IS,
    },
    "merges over words": {
        "model_type": "bpe",
        "vocab_size": 400,
        "split_by_whitespace": False,
        **AS_IT_IS,
    },
    "normalised merges": {"model_type": "bpe", "vocab_size": 150},
    "unigram": {"model_type": "unigram", "vocab_size": 78, **AS_IT_IS},
    "normalised unigram": {"model_type": "unigram", "vocab_size": 78},
    "unigram with bytes": {
        "model_type": "unigram",
        "vocab_size": 338,
        "byte_fallback": True,
        "user_defined_symbols": ["<u1>", "<sep>"],
        **AS_IT_IS,
    },
}


def trained(**settings: Any) -> bytes:
    draw, out = random.Random(3), io.BytesIO()
    corpus = [" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, minloglevel=9, num_threads=1, **settings
    )
    return out.getvalue()


def texts(num: int) -> list[str]:
    draw, found = random.Random(4), []
    for _ in range(num):
        pool = draw.choice([WORDS, list("ab"), [*WORDS, *ODD], [*WORDS, *ODD]])
        between = draw.choice(["", " "])
        found.append(between.join(draw.choice(pool) for _ in range(draw.randrange(14))))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefixes_every_part", [True, False])
def test_a_text_gets_the_ids_that_sentencepiece_gives_it(
    kind: str, prefixes_every_part: bool
) -> None:
    data = trained(**KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    model = SentencePieceModel.parse(data)
    ours = to_tokenizer(model, {}, prefixes_every_part=prefixes_every_part)
    for text in texts(1500):
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text


def test_control_pieces_are_special_tokens_and_cut_a_text() -> None:
    model = SentencePieceModel.parse(trained(**KINDS["as Llama 2"]))
    every = to_tokenizer(model, {}, prefixes_every_part=True)
    first = to_tokenizer(model, {}, prefixes_every_part=False)
    assert every.encode("the</s>the").tokens == ["▁the", "</s>", "▁the"]
    assert first.encode("the</s>a").tokens == ["▁the", "</s>", "a"]


def test_pieces_may_have_other_names() -> None:
    model = SentencePieceModel.parse(trained(control_symbols=["[c8]"], **KINDS["unigram"]))
    place = next(i for i, piece in enumerate(model.pieces) if piece.text == "[c8]")
    ours = to_tokenizer(model, {place: "[TOOL]"}, prefixes_every_part=True)
    assert place in ours.encode("the[TOOL]").ids


def test_the_longest_of_many_texts_is_found_at_once() -> None:
    words = [f"<unused{i}>" for i in range(3000)] + ["a.b", "a", "ab", "abc"]
    pattern = re.compile(longest_of(words))
    assert pattern.findall("<unused7><unused2999>abcaba.bx<unused") == [
        "<unused7>",
        "<unused2999>",
        "abc",
        "ab",
        "a.b",
    ]
    assert len(pattern.pattern) < 20 * len(words)


def message(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


PIECE = message(1, message(1, b"a") + bytes([2 << 3 | 5]) + struct.pack("<f", 0))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no pieces"),
        (b"\x80", "without an end"),
        (b"\xff" * 20, "without an end"),
        (PIECE[:-3], "cut off"),
        (b"\x0b", "kind 3"),
        (PIECE + message(2, b"\x18\x04"), "char models"),
        (PIECE + message(2, b"\xc0\x01\x01"), "spaces that follow"),
        (message(1, b"\x18\x09"), "9 is not a valid"),
    ],
)
def test_what_is_no_such_model_is_a_value_error(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SentencePieceModel.parse(data)
