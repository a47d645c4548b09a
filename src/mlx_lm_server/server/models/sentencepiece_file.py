"""SentencePiece models (`tokenizer.model`), read without the library and made a tokenizer of ours.

The file is a protocol buffer: https://github.com/google/sentencepiece, sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
MODEL_KINDS = {3: "word", 4: "char"}


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What a file says, as far as encoding needs it; a piece's place is its id."""

    pieces: tuple[Piece, ...]
    algorithm: int
    has_byte_fallback: bool
    named_ids: Mapping[str, int]
    charsmap: bytes
    adds_dummy_prefix: bool
    removes_extra_spaces: bool
    escapes_spaces: bool

    @classmethod
    def parse(cls, data: bytes) -> SentencePieceModel:
        """Raises ValueError for anything that is no such file, or has what is not supported."""
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
        if trainer.get(24):
            raise ValueError("spaces that follow a word are not supported")
        algorithm = trainer.get(3, UNIGRAM)
        if algorithm not in (UNIGRAM, BPE):
            raise ValueError(f"{MODEL_KINDS.get(algorithm, algorithm)} models are not supported")
        ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1)}
        ids["eos_token"] = trainer.get(42, 2)
        return cls(
            pieces=tuple(pieces),
            algorithm=algorithm,
            has_byte_fallback=bool(trainer.get(35)),
            named_ids={name: i for name, i in ids.items() if 0 <= i < len(pieces)},
            charsmap=normalizer.get(2, b""),
            adds_dummy_prefix=bool(normalizer.get(3, 1)),
            removes_extra_spaces=bool(normalizer.get(4, 1)),
            escapes_spaces=bool(normalizer.get(5, 1)),
        )

    def ids_of(self, kind: Kind) -> list[int]:
        return [i for i, piece in enumerate(self.pieces) if piece.kind == kind]


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    [score] = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields.get(1, b"").decode(), score, Kind(fields.get(3, Kind.NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"a field of kind {kind}")
        if size < 0 or at + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 64 bits with a sign, and where the next field begins."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value - (1 << 64) if value >> 63 else value), at
        shift += 7
    raise ValueError("a number without an end")


def to_tokenizer(
    model: SentencePieceModel, names: Mapping[int, str], *, prefixes_every_part: bool
) -> HFTokenizer:
    """A tokenizer that gives a text the ids that SentencePiece gives it.

    `names` are other names of pieces, by id. The space that SentencePiece puts before a text is put
    before the first part only, or before every part between special tokens.
    """
    texts = [names.get(i, piece.text) for i, piece in enumerate(model.pieces)]
    build = _bpe if model.algorithm == BPE else _unigram
    tokenizer = HFTokenizer(build(model, texts))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*_prefixes(model, prefixes_every_part), *_splits(model, texts)]
    )
    tokenizer.decoder = decoders.Sequence(_decoders(model))
    tokenizer.add_tokens(
        [AddedToken(texts[i], normalized=False, special=True) for i in model.ids_of(Kind.CONTROL)]
    )
    return tokenizer


def _bpe(model: SentencePieceModel, texts: list[str]) -> models.BPE:
    return models.BPE(
        vocab={text: i for i, text in enumerate(texts)},
        merges=_merges(model, texts),
        unk_token=texts[model.named_ids["unk_token"]] if "unk_token" in model.named_ids else None,
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
        # user-defined pieces come whole out of `_splits`
        ignore_merges=bool(model.ids_of(Kind.USER_DEFINED)),
    )


def _merges(model: SentencePieceModel, texts: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, those of the best score first."""
    normal = {texts[i]: i for i in model.ids_of(Kind.NORMAL)}
    found = []
    for text, i in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                found.append((-model.pieces[i].score, i, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _unigram(model: SentencePieceModel, texts: list[str]) -> models.Unigram:
    return models.Unigram(
        [(text, piece.score) for text, piece in zip(texts, model.pieces, strict=True)],
        model.named_ids.get("unk_token"),
        model.has_byte_fallback,
    )


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if model.charsmap:
        found.append(normalizers.Precompiled(model.charsmap))
    if model.removes_extra_spaces:
        found.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        found.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.escapes_spaces:
        found.append(normalizers.Replace(" ", SPACE))
    return found


def _prefixes(model: SentencePieceModel, every_part: bool) -> list[pre_tokenizers.PreTokenizer]:
    """The first puts a space before a text, even before one that begins with an escaped space, as
    it would not if it put the escaped one itself; the second escapes it."""
    if not model.adds_dummy_prefix:
        return []
    # Where spaces are taken away, the first part may not be known by its place any more.
    scheme = "always" if every_part or model.removes_extra_spaces else "first"
    return [
        pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
        pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
    ]


def _splits(model: SentencePieceModel, texts: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    found: list[pre_tokenizers.PreTokenizer] = []
    if whole := [texts[i] for i in model.ids_of(Kind.USER_DEFINED)]:
        found.append(pre_tokenizers.Split(Regex(longest_of(whole)), "isolated"))
    if model.has_byte_fallback and (whole or model.algorithm == UNIGRAM):
        # A text that looks like the name of a byte is not that byte.
        byte_name = Regex("<(?=0x[0-9A-F]{2}>)")
        found.append(pre_tokenizers.Split(byte_name, "merged_with_previous"))
    return found


def longest_of(texts: list[str]) -> str:
    """A regular expression for the longest of the texts at a place. Beginnings that texts share are
    written once, so that thousands of them are matched as fast as one."""
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _pattern(root)


def _pattern(node: dict[str, Any]) -> str:
    ways = [re.escape(letter) + _pattern(rest) for letter, rest in node.items() if letter]
    if not ways:
        return ""
    return f"(?:{'|'.join(ways)})" + ("?" if "" in node else "")


def _decoders(model: SentencePieceModel) -> list[decoders.Decoder]:
    found: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.has_byte_fallback:
        found.append(decoders.ByteFallback())
    found.append(decoders.Fuse())
    if model.adds_dummy_prefix:
        found.append(decoders.Strip(" ", 1, 0))
    return found
