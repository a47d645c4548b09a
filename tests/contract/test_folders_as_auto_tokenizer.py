"""Folders of random shape, read as `transformers`' AutoTokenizer reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from mlx_lm_server.server.models.model_files import read_facts
from mlx_lm_server.server.models.tokenizer import load_tokenizer

WORDS = ["<unk>", "a", "b", "<s>", "</s>", "<pad>"]
TOKENS = ["<s>", "</s>", "<pad>", "<sep>", "<|end|>", "<img>", "<tool>", "<new>"]
NAMES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
OWN_NAMES = ["image_token", "boi_token", "eot_token"]
SHOWN = [*NAMES, *OWN_NAMES, "additional_special_tokens", "extra_special_tokens"]
TEMPLATE = "".join(f"{name}={{{{ {name} }}}};" for name in SHOWN)
TEXT = "a" + "a".join(TOKENS) + "b"


class Folder:
    """Draws what each file of a folder says."""

    def __init__(self, seed: int, path: Path) -> None:
        self._draw = random.Random(seed)
        self._path = path

    def write(self) -> None:
        self._write("config.json", {"model_type": "llama"})
        self._tokenizer_json()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
        has_added = self._is()
        kinds = ["text"] if has_added else ["text", "typed"]
        config |= self._names(NAMES, kinds) | self._names(OWN_NAMES, kinds)
        config |= self._extras() if self._is() else {}
        if self._is():
            config["added_tokens_decoder"] = self._decoder()
        self._write("tokenizer_config.json", config)
        if self._is():
            late = self._names(NAMES, ["text", "object"]) | self._names(OWN_NAMES, ["text"])
            late |= {} if has_added else self._listed_extras()
            self._write("special_tokens_map.json", late)
        if has_added:
            texts = self._draw.sample(TOKENS, 2)
            self._write("added_tokens.json", {text: 30 + i for i, text in enumerate(texts)})

    def _is(self) -> bool:
        return self._draw.random() < 0.5

    def _write(self, name: str, value: Any) -> None:
        (self._path / name).write_text(json.dumps(value))

    def _tokenizer_json(self) -> None:
        vocab = {word: i for i, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        for text in self._draw.sample(TOKENS, self._draw.randrange(4)):
            tokenizer.add_tokens([AddedToken(text, special=self._is(), normalized=self._is())])
        tokenizer.save(str(self._path / "tokenizer.json"))

    def _names(self, names: list[str], kinds: list[str]) -> dict[str, Any]:
        chosen = self._draw.sample(names, self._draw.randrange(len(names)))
        return {name: self._token(self._draw.choice(kinds)) for name in chosen}

    def _token(self, kind: str) -> Any:
        text = self._draw.choice(TOKENS)
        if kind == "text":
            return text
        flags = {name: self._is() for name in ("lstrip", "rstrip", "normalized", "single_word")}
        return {"content": text, **flags, **({"__type": "AddedToken"} if kind == "typed" else {})}

    def _extras(self) -> dict[str, Any]:
        own = {f"{name}_token": self._token("text") for name in ("audio", "video") if self._is()}
        return {"extra_special_tokens": own} if self._is() else self._listed_extras()

    def _listed_extras(self) -> dict[str, Any]:
        name = self._draw.choice(["additional_special_tokens", "extra_special_tokens"])
        return {name: [self._token("text") for _ in range(self._draw.randrange(3))]}

    def _decoder(self) -> dict[str, Any]:
        texts = self._draw.sample(TOKENS, self._draw.randrange(5))
        return {
            str(len(WORDS) + i): {**self._token("object"), "content": text, "special": self._is()}
            for i, text in enumerate(texts)
        }


@pytest.mark.parametrize("seed", range(150))
async def test_its_special_tokens_are_those_of_auto_tokenizer(seed: int, tmp_path: Path) -> None:
    Folder(seed, tmp_path).write()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, read_facts(tmp_path))
    messages = [{"role": "user", "content": "x"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert ours.template.render(messages, {}) == rendered
    ids = theirs.encode(TEXT, add_special_tokens=False)
    assert await ours.encode(TEXT, add_special_tokens=False) == ids
    assert ours.eos_ids == {i for i in (theirs.eos_token_id,) if i is not None}
    specials = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids_of(TOKENS) == {i for i in map(ours.id_of, TOKENS) if i in specials}
    assert ours.vocab_size == len(theirs)
