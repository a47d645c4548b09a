"""The special tokens of a model's folder, read from all the files that may name them, in the order
in which `transformers`' AutoTokenizer lets one file win over another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mlx_lm_server.server.models.model_files import read_json

STANDARD_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
END_OF_TEXT = "<|endoftext|>"
# What `transformers`' classes take where the files say nothing, by `tokenizer_class`.
CLASS_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "GPTNeoXTokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "pad_token": "<|padding|>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
}


@dataclass(frozen=True)
class SpecialTokens:
    """`named` is what a chat template may read, such as `bos_token`; `added` is to be added to the
    vocabulary, in this order, where a token is not there already with the same flags."""

    named: Mapping[str, str]
    added: tuple[AddedToken, ...]


def read_special_tokens(
    folder: Path,
    tokenizer_config: Mapping[str, Any],
    known: Mapping[int, AddedToken],
    defaults: Mapping[str, str],
) -> SpecialTokens:
    """`known` are the added tokens that the vocabulary has; `defaults` name tokens that no file
    names. Raises ModelError for a file that is no JSON object."""
    config = {**defaults, **tokenizer_config}
    has_decoder = "added_tokens_decoder" in config
    # The decoder is the newer way to write what the other files say; beside it they are void.
    special_map = {} if has_decoder else read_json(folder / "special_tokens_map.json")
    named, extra = _named(config, special_map), _extra(config, special_map)
    if has_decoder:
        added = _decoder(config["added_tokens_decoder"])
    else:
        specials = {_text(value) for value in (*(named.get(n) for n in STANDARD_NAMES), *extra)}
        added = {**_listed(read_json(folder / "added_tokens.json"), specials), **known}
    texts = {name: text for name, value in named.items() if (text := _text(value)) is not None}
    distinct = {repr(value): value for value in (*named.values(), *extra)}.values()
    named_tokens = [_token(value, is_special=True) for value in distinct]
    return SpecialTokens(
        texts, tuple(_news(added, named_tokens, known.values(), frozenset(texts.values())))
    )


def token_texts(tokenizer_config: Mapping[str, Any]) -> dict[int, str]:
    """The texts of `added_tokens_decoder`, by id."""
    added = _decoder(tokenizer_config.get("added_tokens_decoder"))
    return {token_id: token.content for token_id, token in added.items()}


def _news(
    added: Mapping[int, AddedToken],
    named: Iterable[AddedToken | None],
    known: Iterable[AddedToken],
    special_texts: Collection[str],
) -> Iterator[AddedToken]:
    """Returns what the vocabulary is to learn: first by id, then by name."""
    have = {token.content: token for token in known}
    listed = {added[token_id].content: added[token_id] for token_id in sorted(added)}
    unlisted = {
        token.content: token
        for token in named
        if token is not None and token.content not in have and token.content not in listed
    }
    wanted = listed | unlisted
    for text, token in wanted.items():
        if text in special_texts and not token.special:
            token = _as_special(token)
        same = have.get(text)
        if same is not token and repr(same) != repr(token):
            yield token


def _named(tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens by name, the standard names first. Of these special_tokens_map.json's win, of a
    model's own (`image_token`) those that tokenizer_config.json writes as text."""
    config, late = _token_fields(tokenizer_config), _token_fields(special_map)
    as_text = {name: value for name, value in config.items() if isinstance(value, str)}
    typed = {name: value for name, value in config.items() if name not in as_text}
    both = {**config, **late}
    named = {name: both[name] for name in STANDARD_NAMES if name in both}
    own = {**typed, **late, **as_text, **_own(tokenizer_config), **_own(special_map)}
    return named | {name: value for name, value in own.items() if name not in STANDARD_NAMES}


def _token_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields whose value is a token, or null for none."""
    return {
        name: value
        for name, value in source.items()
        if name.endswith("_token") and (value is None or _text(value) is not None)
    }


def _own(source: Mapping[str, Any]) -> dict[str, Any]:
    found = source.get("extra_special_tokens")
    return found if isinstance(found, dict) else {}


def _extra(tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[Any]:
    """Tokens without a name."""
    names = ("extra_special_tokens", "additional_special_tokens")
    found = next((list_ for name in names if (list_ := _list(tokenizer_config.get(name)))), [])
    late = _list(special_map.get(names[0]))
    if not late and not any(isinstance(tokenizer_config.get(name), list) for name in names):
        late = _list(special_map.get(names[1]))
    return [*found, *late]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _decoder(given: Any) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: ids as texts, with the token's flags."""
    pairs = given.items() if isinstance(given, dict) else ()
    tokens = ((key, _token(value)) for key, value in pairs if str(key).isdecimal())
    return {int(key): token for key, token in tokens if token is not None}


def _listed(given: Mapping[str, Any], specials: Collection[str | None]) -> dict[int, AddedToken]:
    """added_tokens.json: texts with their ids."""
    ids = {token_id: text for text, token_id in given.items() if isinstance(token_id, int)}
    return {
        token_id: AddedToken(text, normalized=text not in specials, special=text in specials)
        for token_id, text in ids.items()
    }


def _text(value: Any) -> str | None:
    """A token is written as its text, or as an object with the text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token(value: Any, *, is_special: bool = False) -> AddedToken | None:
    text = _text(value)
    if not text:
        return None
    if not isinstance(value, dict):
        return AddedToken(text, special=is_special)
    flags = {name: value[name] for name in FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(text, **(flags | {"special": True} if is_special else flags))


def _as_special(token: AddedToken) -> AddedToken:
    flags = {name: getattr(token, name) for name in FLAGS}
    return AddedToken(token.content, **(flags | {"special": True}))
