"""The model's tokenizer, without `transformers`: tokenizer.json and the chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Sequence as DecoderSequence

from mlx_lm_server.errors import ContextLengthError, InvalidRequestError
from mlx_lm_server.parsing.detokenizer import (
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
    byte_alphabet,
)
from mlx_lm_server.server.large_work import run_large
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.model_files import ModelFacts
from mlx_lm_server.server.models.special_tokens import CLASS_DEFAULTS, read_special_tokens
from mlx_lm_server.server.models.template_files import (
    DEFAULT,
    TOOL_USE,
    find_templates,
    without_default,
)
from mlx_lm_server.server.models.vocabulary_files import Vocabulary, read_vocabulary

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
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """The tokenizer of one model. Encodes on a thread where that takes long; everything else is
    immediate."""

    def __init__(
        self,
        backend: HFTokenizer,
        template: ChatTemplate | None,
        eos_ids: frozenset[int],
        leading_ids: Sequence[int] = (),
        template_variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> None:
        """`leading_ids` are those that encoding with special tokens puts before a text (BOS).
        `template_variables` are what every chat template gets."""
        self._backend = backend
        self._template = template
        self.eos_ids = eos_ids
        self.leading_ids = list(leading_ids)
        self.template_variables = template_variables
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        self._is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_letters = "ByteLevel" in kinds
        self._written = _written_tokens(backend, added) if self._has_byte_letters else {}
        self._byte_tables: dict[frozenset[int], ByteTable] = {}
        self._byte_ids = _byte_fallback_ids(backend)
        self._plain_backend: HFTokenizer | None = None  # reads special tokens as text

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises InvalidRequestError where it has none."""
        if self._template is None:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions, or start with --chat-template"
            )
        return self._template

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of special tokens by their texts."""
        texts = ((self._backend.id_to_token(i), i) for i in self._special_ids)
        return {text: i for text, i in texts if text}

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        """Returns the ids of special tokens that are one of the texts, or a part of one."""
        found = (i for token, i in self.special_tokens.items() if any(token in t for t in texts))
        return frozenset(found)

    def set_template(self, source: str) -> None:
        """Puts another chat template in place of the model's. Raises ModelError."""
        self._template = ChatTemplate(source, self.template_variables)

    async def tokens_of(self, ids: Sequence[int]) -> list[str | None]:
        """Returns tokens as the vocabulary writes them."""
        if len(ids) <= MAX_INLINE_TOKENS:
            return self._tokens_of(ids)
        return await asyncio.to_thread(self._tokens_of, ids)

    def _tokens_of(self, ids: Sequence[int]) -> list[str | None]:
        return [self._backend.id_to_token(i) for i in ids]

    def ids_of(self, text: str) -> list[int]:
        """Returns the ids of a short text, at once."""
        return self._encode(text, add_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    async def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        """Returns the ids of a text. Special tokens that lead every text (BOS) are not added where
        the text begins with them; without `parse_special` nothing in it is a special token.

        Raises InvalidRequestError for text that is no valid Unicode, ContextLengthError for one
        that is too long for any model.
        """
        backend = self._backend if parse_special else await self._without_specials()
        if len(text) <= MAX_INLINE_CHARS:
            return self._encode(text, add_special_tokens, backend)
        if len(text) <= LARGE_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens, backend)
        return await run_large(partial(self._encode_large, text, add_special_tokens, backend))

    def _encode_large(self, text: str, add_special_tokens: bool, backend: HFTokenizer) -> list[int]:
        """Raises ContextLengthError once a beginning of the text is beyond what is encoded."""
        num_chars = BEGINNING_CHARS
        while num_chars < len(text):
            num_tokens = len(self._encode(text[:num_chars], add_special_tokens, backend))
            if num_tokens > MAX_TEXT_TOKENS:
                raise ContextLengthError(
                    f"the text has {num_tokens} tokens in its first {num_chars} of "
                    f"{len(text)} characters; no text of more than {MAX_TEXT_TOKENS} is encoded"
                )
            num_chars *= 4
        return self._encode(text, add_special_tokens, backend)

    async def _without_specials(self) -> HFTokenizer:
        """Returns the copy that knows no special tokens, made on a thread when first asked for."""
        if self._plain_backend is None:
            self._plain_backend = await asyncio.to_thread(_without_specials, self._backend)
        return self._plain_backend

    def _encode(
        self, text: str, add_special_tokens: bool, backend: HFTokenizer | None = None
    ) -> list[int]:
        # A batch of one: only the batch call lets go of the GIL.
        backend = backend or self._backend
        try:
            [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError("the text is no valid Unicode") from error
        ids: list[int] = encoding.ids
        num = len(self.leading_ids) if add_special_tokens else 0
        return ids[num:] if num and ids[num : 2 * num] == self.leading_ids else ids

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
                self._backend.id_to_token, hidden_ids, self._written
            )
        return table

    def _whole_table(self) -> ByteTable:
        return self._table(self._special_ids, frozenset())

    def bytes_of(self, token_id: int) -> bytes:
        """What one token stands for, special tokens too; half a character where it is so."""
        if self._has_byte_letters:
            return self._whole_table()[token_id]
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
        if self._is_byte_level and self._written:  # the backend takes their letters for bytes
            return self._whole_table().decode(ids)
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _decode_long(self, ids: list[int]) -> str:
        if self._is_byte_level and self._written:
            return self._decode(ids)
        # As with encoding, only the batch call lets go of the GIL.
        [text] = self._backend.decode_batch([ids], skip_special_tokens=False)
        return str(text)


def _without_specials(backend: HFTokenizer) -> HFTokenizer:
    """Returns a copy that reads no special tokens, since the switch is the whole tokenizer's."""
    copy = HFTokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


def _byte_fallback_ids(backend: HFTokenizer) -> frozenset[int]:
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


def _decoder_kinds(backend: HFTokenizer) -> list[str]:
    """The decoders one after another, without those that only join the pieces."""
    if isinstance(backend.decoder, ByteLevelDecoder):
        return ["ByteLevel"]
    if not isinstance(backend.decoder, DecoderSequence):
        return []
    members = json.loads(backend.decoder.__getstate__())["decoders"]
    return [member["type"] for member in members if member["type"] != "Fuse"]


def _written_tokens(backend: HFTokenizer, added: Mapping[int, AddedToken]) -> dict[int, bytes]:
    """Added tokens that are letters of the byte alphabet and yet stand for themselves, since the
    text's bytes are never cut into them."""
    letters = byte_alphabet()
    return {
        token_id: token.content.encode()
        for token_id, token in added.items()
        if not token.content.isascii()
        and letters.keys() >= set(token.content)
        and backend.model.id_to_token(token_id) is None
    }


def _leading_ids(backend: HFTokenizer) -> list[int]:
    """What is put before every text."""
    text: list[int] = backend.encode("a", add_special_tokens=False).ids
    whole: list[int] = backend.encode("a").ids
    starts = range(len(whole) - len(text) + 1)
    return next((whole[:i] for i in starts if whole[i : i + len(text)] == text), [])


def load_tokenizer(
    folder: Path,
    facts: ModelFacts,
    chat_template: str | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Returns the folder's tokenizer. Raises ModelError where it has none that can be read."""
    vocabulary, is_converted = read_vocabulary(folder, facts)
    backend = vocabulary.backend
    specials = _settle_special_tokens(vocabulary, folder, facts)
    if is_converted:
        vocabulary.finish(facts.tokenizer_config, specials)
    templates = find_templates(folder, facts.tokenizer_config, chat_template)
    template, variables = None, {**specials, **(chat_template_args or {})}
    if templates:
        template = ChatTemplate(
            templates.get(DEFAULT) or without_default(templates),
            variables,
            tool_use=templates.get(TOOL_USE),
        )
    eos_ids = facts.eos_ids
    eos = backend.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    eos_ids = eos_ids if eos is None else eos_ids | {eos}
    return Tokenizer(backend, template, eos_ids, _leading_ids(backend), variables)


def _settle_special_tokens(
    vocabulary: Vocabulary, folder: Path, facts: ModelFacts
) -> Mapping[str, str]:
    """Adds the tokens that only other files have, and returns the special ones by name."""
    backend, config = vocabulary.backend, facts.tokenizer_config
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    defaults = {**CLASS_DEFAULTS.get(kind, {}), **vocabulary.names}
    known = backend.get_added_tokens_decoder()
    specials = read_special_tokens(
        folder,
        config,
        known,
        {name: text for name, text in defaults.items() if backend.token_to_id(text) is not None},
    )
    backend.add_tokens(_with_rows(specials.added, backend, known, facts.num_rows))
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    return specials.named


def _with_rows(
    tokens: Sequence[AddedToken],
    backend: HFTokenizer,
    known: Collection[int],
    num_rows: int | None,
) -> list[AddedToken]:
    """Returns those of the tokens that the vocabulary has, or that get an id for which the model
    has a row in its table."""
    size = max(backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in known), 0)
    found = []
    for token in tokens:
        if backend.token_to_id(token.content) is None:
            if num_rows is not None and size >= num_rows:
                continue
            size += 1
        found.append(token)
    return found
