from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_lm_server.parsing.detokenizer import (
    MAX_HELD_TOKENS,
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
)

TEXTS = [
    "hello world",
    "  two  spaces ",
    "Zwölf Boxkämpfer",
    "東京 🥊👩‍👩‍👧 é",
    "\n\ttabs\r\n",
    "<a>x<a>",
]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "Ġ"), ("Ã", "¶")]
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<a>"), AddedToken("日本")])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: spaces are ▁, unknown characters are bytes."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", *"helowrdtsaBxk<>é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<a>")])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "he", "##llo", "wor", "##ld", "hello", "é", "##é", "東京", "."]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<a>"), AddedToken("日本")])
    return tokenizer


def word_ends() -> Tokenizer:
    words = ["he", "llo</w>", "wor", "ld</w>", "é", "é</w>", "東京</w>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<a>"), AddedToken("日本")])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def by_table(tokenizer: Tokenizer) -> Detokenizer:
    return ByteLevelDetokenizer(ByteTable(tokenizer.id_to_token, special_ids(tokenizer)))


def by_window(tokenizer: Tokenizer) -> Detokenizer:
    byte_ids = (tokenizer.token_to_id(f"<0x{b:02X}>") for b in range(256))
    return WindowDetokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        special_ids(tokenizer),
        frozenset(i for i in byte_ids if i is not None),
        tokenizer.get_vocab_size(with_added_tokens=True),
    )


KINDS: dict[str, tuple[Tokenizer, Callable[[Tokenizer], Detokenizer]]] = {
    "byte level": (byte_level(), by_table),
    "byte level by window": (byte_level(), by_window),
    "byte fallback": (byte_fallback(), by_window),
    "metaspace": (metaspace(), by_window),
}
kinds = pytest.mark.parametrize("kind", KINDS)
# Of these a text cannot be had, only ids.
KINDS_OF_IDS = {"word pieces": (word_pieces(), by_window), "word ends": (word_ends(), by_window)}
ALL_KINDS = KINDS | KINDS_OF_IDS


def pieces_of(kind: str, ids: list[int], step: int = 1) -> list[str]:
    tokenizer, make = ALL_KINDS[kind]
    detokenizer = make(tokenizer)
    pieces = [detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_of_random_ids_are_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer, _ = ALL_KINDS[kind]
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=MAX_HELD_TOKENS - 4))
    step = data.draw(st.integers(1, 4))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(kind, ids, step)) == whole


@kinds
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_cuts_a_character(kind: str, text: str) -> None:
    tokenizer, _ = KINDS[kind]
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(kind, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@kinds
def test_text_comes_as_soon_as_it_is_complete(kind: str) -> None:
    tokenizer, make = KINDS[kind]
    detokenizer = make(tokenizer)
    pieces = [detokenizer.push([i]) for i in tokenizer.encode("hello").ids]
    assert "".join(pieces) == "hello"


@kinds
def test_special_tokens_have_no_text(kind: str) -> None:
    tokenizer, _ = KINDS[kind]
    eos = tokenizer.token_to_id("<eos>")
    ids = [eos, *tokenizer.encode("he").ids, eos, *tokenizer.encode("lo").ids]
    assert "<eos>" not in "".join(pieces_of(kind, ids))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "metaspace"])
def test_a_sequence_that_ends_within_a_character_ends_with_a_replacement(kind: str) -> None:
    tokenizer, _ = KINDS[kind]
    ids = tokenizer.encode("🥊").ids[:-1]
    assert set("".join(pieces_of(kind, ids)).strip()) == {"\ufffd"}


@kinds
def test_bytes_without_end_are_not_held_for_ever(kind: str) -> None:
    tokenizer, make = KINDS[kind]
    name = "ð" if kind.startswith("byte level") else "<0xF0>"
    detokenizer = make(tokenizer)
    given = "".join(detokenizer.push([tokenizer.token_to_id(name)]) for _ in range(500))
    assert len(given) > 300


def test_a_window_stays_small() -> None:
    """However long the sequence, only a few tokens are decoded for the next."""
    tokenizer, _ = KINDS["byte fallback"]
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    detokenizer = WindowDetokenizer(decode, frozenset(), frozenset(), tokenizer.get_vocab_size())
    for _ in range(200):
        for token_id in tokenizer.encode("hello world").ids:
            detokenizer.push([token_id])
    assert longest <= 6


def test_tokens_without_text_are_not_kept_for_ever() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return ""

    detokenizer = WindowDetokenizer(decode, frozenset(), frozenset(), 1)
    for _ in range(10_000):
        detokenizer.push([0])
    assert longest <= MAX_HELD_TOKENS + 2


def test_what_is_written_as_it_is_is_no_byte_letter() -> None:
    table = ByteTable({0: "é", 1: "é", 2: "<s>"}.get, [2], {1: "é".encode()})
    assert [table[i] for i in range(4)] == [b"\xe9", "é".encode(), b"", b""]
    assert table.decode([1, 0, 1]) == "é\ufffdé"
