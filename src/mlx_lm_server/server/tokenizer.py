"""The model's tokenizer, without `transformers`: tokenizer.json and the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder

from mlx_lm_server.errors import ContextLengthError, InvalidRequestError, ModelError
from mlx_lm_server.parsing.detokenizer import (
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
)
from mlx_lm_server.server.chat_template import ChatTemplate, find_template
from mlx_lm_server.server.large_work import run_large
from mlx_lm_server.server.model_files import ModelFacts

# A text this long takes a few milliseconds to encode; longer ones leave the event loop.
MAX_INLINE_CHARS = 8192
MAX_INLINE_TOKENS = 2048
# Texts longer than this are encoded one after the other: each takes a hundred times its length.
LARGE_CHARS = 2**20
# More tokens than a prompt can have. Texts that are long enough for so many are tried at the
# beginning first.
MAX_TEXT_TOKENS = 2**20
BEGINNING_CHARS = 4 * MAX_TEXT_TOKENS
# What rendering a message costs beyond its text, as if it were so much longer.
CHARS_PER_MESSAGE = 64
CHARS_PER_TOOL = 512
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Of one model. Encodes on a thread where that takes long; everything else is immediate."""

    def __init__(
        self, backend: HFTokenizer, template: ChatTemplate | None, eos_ids: frozenset[int]
    ) -> None:
        self._backend = backend
        self._template = template
        self.eos_ids = eos_ids
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._is_byte_level = isinstance(backend.decoder, ByteLevelDecoder)
        self._byte_tables: dict[frozenset[int], ByteTable] = {}
        self._byte_ids = _byte_fallback_ids(backend)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template(self) -> ChatTemplate:
        """Raises InvalidRequestError."""
        if self._template is None:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions, or start with --chat-template"
            )
        return self._template

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        """Ids of those of the texts that are special tokens."""
        found = (self._backend.token_to_id(text) for text in texts)
        return frozenset(i for i in found if i in self._special_ids)

    async def tokens_of(self, ids: Sequence[int]) -> list[str | None]:
        """As the vocabulary writes them."""
        if len(ids) <= MAX_INLINE_TOKENS:
            return self._tokens_of(ids)
        return await asyncio.to_thread(self._tokens_of, ids)

    def _tokens_of(self, ids: Sequence[int]) -> list[str | None]:
        return [self._backend.id_to_token(i) for i in ids]

    def ids_of(self, text: str) -> list[int]:
        """Of a short text, at once."""
        return self._encode(text, add_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequestError for text that is no valid Unicode, ContextLengthError for one
        that is too long for any model."""
        if len(text) <= MAX_INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        if len(text) <= LARGE_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return await run_large(partial(self._encode_large, text, add_special_tokens))

    def _encode_large(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises ContextLengthError once a beginning of the text is beyond what is encoded."""
        num_chars = BEGINNING_CHARS
        while num_chars < len(text):
            num_tokens = len(self._encode(text[:num_chars], add_special_tokens))
            if num_tokens > MAX_TEXT_TOKENS:
                raise ContextLengthError(
                    f"the text has {num_tokens} tokens in its first {num_chars} of "
                    f"{len(text)} characters; no text of more than {MAX_TEXT_TOKENS} is encoded"
                )
            num_chars *= 4
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: only the batch call lets go of the GIL.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt, as a rule up to where the assistant speaks. Raises InvalidRequestError."""
        render = partial(
            self.template.render,
            messages,
            variables,
            tools,
            add_generation_prompt=add_generation_prompt,
        )
        num_chars = sum(CHARS_PER_MESSAGE + len(str(m.get("content"))) for m in messages)
        num_chars += CHARS_PER_TOOL * len(tools or ())
        return render() if num_chars <= MAX_INLINE_CHARS else await asyncio.to_thread(render)

    def detokenizer(self, visible_ids: frozenset[int] = frozenset()) -> Detokenizer:
        """A fresh one for one sequence; special tokens have no text, but for `visible_ids`."""
        hidden_ids = self._special_ids - visible_ids if visible_ids else self._special_ids
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._table(visible_ids, hidden_ids))
        return WindowDetokenizer(self._decode, hidden_ids, self._byte_ids, self.vocab_size)

    def _table(self, visible_ids: frozenset[int], hidden_ids: frozenset[int]) -> ByteTable:
        table = self._byte_tables.get(visible_ids)
        if table is None:
            table = self._byte_tables[visible_ids] = ByteTable(
                self._backend.id_to_token, hidden_ids
            )
        return table

    def bytes_of(self, token_id: int) -> bytes:
        """What one token stands for, special tokens too; half a character where it is so."""
        if self._is_byte_level:
            return self._table(self._special_ids, frozenset())[token_id]
        token = self._backend.id_to_token(token_id) or ""
        if token_id in self._byte_ids:
            return bytes.fromhex(token[3:5])
        # A leading space belongs to the token, but a decoder drops it at the start of a text.
        return token.replace("\u2581", " ").encode()

    def decode_few(self, ids: Sequence[int]) -> str:
        """The text of some ids, for people."""
        return self._decode([i for i in ids if i < self.vocab_size])

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as they are, special tokens included."""
        known = [i for i in ids if i < self.vocab_size]
        if len(known) <= MAX_INLINE_TOKENS:
            return self._decode(known)
        return await asyncio.to_thread(self._decode_long, known)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _decode_long(self, ids: list[int]) -> str:
        # As with encoding, only the batch call lets go of the GIL.
        [text] = self._backend.decode_batch([ids], skip_special_tokens=False)
        return str(text)


def _byte_fallback_ids(backend: HFTokenizer) -> frozenset[int]:
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


def load_tokenizer(
    folder: Path,
    facts: ModelFacts,
    chat_template: str | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Raises ModelError where the folder has none that can be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json")
    try:
        backend = HFTokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    specials = {
        name: text
        for name in SPECIAL_TOKEN_NAMES
        if (text := _token_text(facts.tokenizer_config.get(name))) is not None
    }
    source = find_template(folder, facts.tokenizer_config, chat_template)
    template = None
    if source is not None:
        template = ChatTemplate(source, {**specials, **(chat_template_args or {})})
    eos_ids = facts.eos_ids
    eos = backend.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return Tokenizer(backend, template, eos_ids if eos is None else eos_ids | {eos})


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json writes a token as text or as an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
