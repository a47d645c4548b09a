"""Token ids to text, piece by piece.

The pieces of a sequence, joined, are what decoding all its ids at once gives, and no piece ends
within a character. There are two ways:

- `ByteLevelDetokenizer` where each token stands for fixed bytes (GPT-2's alphabet: Qwen, Llama 3,
  nano …): a table and an incremental UTF-8 decoder, under a microsecond a token;
- `WindowDetokenizer` for every other decoder (SentencePiece …): decodes the last few tokens with
  and without the new ones and gives the difference. Tokens of single bytes are held until their
  run ends, since only then is it known whether they are characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

REPLACEMENT = "\ufffd"
# A run of bytes that has not become text by then is given as it is.
MAX_HELD_TOKENS = 64


class Detokenizer(Protocol):
    """Of one sequence."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that the new ids complete."""
        ...

    def flush(self) -> str:
        """What is left when the sequence ends."""
        ...


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as letter → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class ByteTable:
    """The bytes of each token of one vocabulary, looked up once; special tokens have none.

    `written` are the bytes of tokens that stand for themselves though they are letters of the
    alphabet: an added token `é` is an é, not half a character.
    """

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        special_ids: Iterable[int],
        written: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        self._id_to_token = id_to_token
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {**written, **dict.fromkeys(special_ids, b"")}

    def __getitem__(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id) or ""
        try:
            return bytes([self._alphabet[letter] for letter in token])
        except KeyError:  # an added token is written as it is
            return token.encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join([self[token_id] for token_id in ids]).decode("utf-8", "replace")


class ByteLevelDetokenizer:
    __slots__ = ("_decoder", "_table")

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[token_id] for token_id in ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`decode` gives the text of ids. `special_ids` and ids from `vocab_size` on (a model's
    vocabulary may be padded) have none; they are left out before."""

    __slots__ = (
        "_byte_ids",
        "_decode",
        "_ids",
        "_num_sent",
        "_sent_text",
        "_special_ids",
        "_vocab_size",
    )

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        special_ids: frozenset[int],
        byte_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._vocab_size = vocab_size
        # _ids = tokens whose text was sent, kept as context for the next  +  tokens held
        self._ids: list[int] = []
        self._num_sent = 0
        self._sent_text = ""

    def push(self, ids: Iterable[int]) -> str:
        for token_id in ids:
            if token_id < self._vocab_size and token_id not in self._special_ids:
                self._ids.append(token_id)
        num_held = len(self._ids) - self._num_sent
        if num_held == 0 or (self._ids[-1] in self._byte_ids and num_held < MAX_HELD_TOKENS):
            return ""
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and num_held < MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        if len(self._ids) == self._num_sent:
            return ""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._sent_text) :]
        context = self._ids[self._num_sent :]
        context_text = self._decode(context)
        if context_text or len(self._ids) > MAX_HELD_TOKENS:
            self._ids, self._sent_text = context, context_text
        else:  # tokens without text cannot stand for what came before them
            self._sent_text = text
        self._num_sent = len(self._ids)
        return piece
