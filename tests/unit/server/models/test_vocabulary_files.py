from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.models.test_byte_ranks import HAN, file_of, ranks_of, tekken_of
from tests.unit.server.models.test_byte_ranks import texts as texts_of_bytes
from tests.unit.server.models.test_sentencepiece_file import KINDS, texts, trained
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from mlx_lm_server.errors import ModelError
from mlx_lm_server.server.models.model_files import read_facts
from mlx_lm_server.server.models.tokenizer import Tokenizer as Ours
from mlx_lm_server.server.models.tokenizer import load_tokenizer
from mlx_lm_server.server.models.vocabulary_files import QWEN2_PATTERN


def write(folder: Path, files: dict[str, bytes | str], **tokenizer_config: Any) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def load(folder: Path) -> Ours:
    return load_tokenizer(folder, read_facts(folder))


def special(**ids: int) -> dict[str, Any]:
    given = {str(i): {"content": f"<{name}>", "special": True} for name, i in ids.items()}
    return {"added_tokens_decoder": given}


@pytest.mark.parametrize("adds_bos", [True, False])
async def test_a_folder_with_a_sentencepiece_model_only(tmp_path: Path, adds_bos: bool) -> None:
    data = trained(**KINDS["as Llama 2"])
    config = {"add_bos_token": adds_bos, "legacy": True, "bos_token": "<s>", **special(end=400)}
    folder = write(tmp_path, {"tokenizer.model": data}, **config)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load(folder)
    for text in texts(300):
        for whole in (text, f"{text}</s>{text}<end>{text}"):
            assert await ours.encode(whole, add_special_tokens=True) == theirs.encode(whole)
    assert ours.eos_ids == {theirs.eos_token_id} == {2}
    assert len(ours.leading_ids) == adds_bos


async def test_the_space_before_a_text_may_be_switched_off(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"tokenizer.model": trained(**KINDS["as Llama 2"])}
    ours = load(write(tmp_path, files, add_prefix_space=False))
    assert (await ours.tokens_of(ours.ids_of("the")))[0] != "▁the"


async def test_a_folder_with_ranks_and_code(tmp_path: Path) -> None:
    ranks = ranks_of(HAN)
    size = len(ranks)
    files: dict[str, bytes | str] = {
        "tiktoken.model": file_of(ranks),
        "tokenization_kimi.py": f'class T:\n    pat_str = "|".join([{HAN!r}])\nraise SystemExit',
    }
    config = {**special(bos=size, end=size + 3), "bos_token": "<bos>", "eos_token": "<end>"}
    ours = load(write(tmp_path, files, **config))
    reserved = f"<|reserved_token_{size + 1}|>"
    assert await ours.decode([size, size + 1, size + 3]) == f"<bos>{reserved}<end>"
    assert ours.eos_ids == {size + 3}
    assert ours.ids_of("a<end>") == [ranks[b"a"], size + 3]
    for text in texts_of_bytes(100):
        assert await ours.decode(ours.ids_of(text)) == text


async def test_qwens_first_models_have_their_special_tokens_in_code(tmp_path: Path) -> None:
    ranks = ranks_of(QWEN2_PATTERN)
    code = f"import unicodedata\nPAT_STR = {QWEN2_PATTERN!r}\nx = unicodedata.normalize('NFC', y)"
    files: dict[str, bytes | str] = {"qwen.tiktoken": file_of(ranks), "tokenization_qwen.py": code}
    ours = load(write(tmp_path, files, tokenizer_class="QWenTokenizer"))
    assert ours.ids_of("<|im_start|>e\u0301")[0] == len(ranks) + 1
    assert ours.ids_of("e\u0301") == ours.ids_of("é")


async def test_glm_4_leads_a_text_with_two_tokens(tmp_path: Path) -> None:
    ranks = ranks_of(QWEN2_PATTERN)
    size = len(ranks)
    names = {size: "<|endoftext|>", size + 1: "[gMASK]", size + 2: "<sop>"}
    config = {
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": {str(i): {"content": text} for i, text in names.items()},
    }
    code = f"class T:\n    def __init__(self):\n        pat_str = {QWEN2_PATTERN!r}"
    files: dict[str, bytes | str] = {
        "tokenizer.model": file_of(ranks),
        "tokenization_chatglm.py": code,
    }
    ours = load(write(tmp_path, files, **config))
    assert await ours.encode("a", add_special_tokens=True) == [size + 1, size + 2, ranks[b"a"]]


async def test_llama_3s_own_file_needs_no_code(tmp_path: Path) -> None:
    ranks = ranks_of(QWEN2_PATTERN)
    folder = write(tmp_path, {"tokenizer.model": file_of(ranks)}, **special(end=len(ranks)))
    theirs, ours = AutoTokenizer.from_pretrained(folder), load(folder)
    for text in texts_of_bytes(200):
        assert ours.ids_of(f"{text}<end>") == theirs.encode(f"{text}<end>")


async def test_a_folder_with_a_tekken_only(tmp_path: Path) -> None:
    folder = write(tmp_path, {"tekken.json": json.dumps(tekken_of(ranks_of(HAN), HAN))})
    theirs, ours = AutoTokenizer.from_pretrained(folder), load(folder)
    for text in texts_of_bytes(200):
        assert ours.ids_of(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.leading_ids == [1]
    assert load(write(tmp_path, {}, add_bos_token=False)).leading_ids == []


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
async def test_a_folder_with_gpt_2s_two_files(tmp_path: Path, kind: str) -> None:
    vocab = {text: i for i, text in enumerate([*"abcdefgh'", "Ġ", "ab", "abc", "Ġab"])}
    merges = "#version: 0.2\na b\nab c\nĠ ab\n"
    files: dict[str, bytes | str] = {"vocab.json": json.dumps(vocab), "merges.txt": merges}
    ours = load(write(tmp_path, files, tokenizer_class=kind))
    assert await ours.tokens_of(ours.ids_of("abc ab h")) == ["abc", "Ġab", "Ġ", "h"]


def test_a_tokenizer_json_goes_first(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.model": b"x", "tekken.json": "x"})
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).ids_of("a") == [0]


RANKS: dict[str, bytes | str] = {"tiktoken.model": b"YQ== 0\n"}
CODE = {"tokenization_x.py": 'pat_str = "a"'}


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({}, {}, r"no tokenizer\.json.*save_pretrained"),
        ({"tokenizer.json": "{}"}, {}, r"tokenizer\.json cannot be read"),
        ({"tokenizer.model": b"\x80"}, {}, r"SentencePiece model: .*save_pretrained"),
        ({"tekken.json": "{}"}, {}, r"tekken\.json cannot be read: it has no"),
        (RANKS, {"tokenizer_class": "X", **special(a=1)}, "how it cuts a text.*transformers<5"),
        ({**RANKS, **CODE}, {}, "which special tokens it has.*transformers<5"),
        ({"vocab.json": "{}"}, {"tokenizer_class": "XTokenizer"}, "how XTokenizer cuts"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_way_out(
    tmp_path: Path, files: dict[str, bytes | str], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, files, **config))
