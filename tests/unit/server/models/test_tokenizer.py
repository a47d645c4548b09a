from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.models import tokenizer as loading
from mlx_lm_server.server.models.model_files import read_facts
from mlx_lm_server.server.protocols.openai.infill import infill_prompt

WORDS = {"a": 0, "<s>": 1, "</s>": 2, "b": 3}
USER = [{"role": "user", "content": "x"}]


def words(leading: str = "<s>", added: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken(text, special=True) for text in added])
    if leading:
        names = leading.split()
        ids = [(name, backend.token_to_id(name)) for name in names]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{leading} $A", special_tokens=ids
        )
    return backend


def letters() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return backend


def load(
    folder: Path, backend: Tokenizer, config: dict[str, Any] | None = None, **tokenizer: Any
) -> loading.Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return loading.load_tokenizer(folder, read_facts(folder))


async def test_what_leads_every_text_is_not_added_to_a_text_that_has_it(tmp_path: Path) -> None:
    one = load(tmp_path, words())
    assert await one.encode("ab", add_special_tokens=True) == [1, 0, 3]
    assert await one.encode("<s>ab", add_special_tokens=True) == [1, 0, 3]
    assert await one.encode("<s><s>ab", add_special_tokens=True) == [1, 1, 0, 3]
    assert await one.encode("", add_special_tokens=True) == [1]
    assert await one.encode("<s>", add_special_tokens=True) == [1]
    assert await one.encode("<s>ab", add_special_tokens=False) == [1, 0, 3]


async def test_several_tokens_may_lead_a_text(tmp_path: Path) -> None:
    one = load(tmp_path, words("</s> <s>"))
    assert await one.encode("a", add_special_tokens=True) == [2, 1, 0]
    assert await one.encode("</s><s>a", add_special_tokens=True) == [2, 1, 0]
    assert await one.encode("<s>a", add_special_tokens=True) == [2, 1, 1, 0]


async def test_what_ends_every_text_leads_none(tmp_path: Path) -> None:
    backend = words("")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    one = load(tmp_path, backend)
    assert await one.encode("</s></s>a", add_special_tokens=True) == [2, 2, 0, 2]


async def test_filling_in_begins_with_what_leads_every_text_once(tmp_path: Path) -> None:
    added = ("<s>", "</s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    one = load(tmp_path, words(added=added))
    assert await infill_prompt("a", "b", one) == [1, 4, 0, 5, 3, 6]
    assert await infill_prompt("<s>a", "b", one) == [1, 4, 0, 5, 3, 6]
    two = load(tmp_path, words("", added=added))
    assert await infill_prompt("a", "b", two) == [4, 0, 5, 3, 6]


async def test_filling_in_may_have_the_suffix_first(tmp_path: Path) -> None:
    one = load(tmp_path, words(added=("<s>", "</s>", "[PREFIX]", "[SUFFIX]")))
    assert await infill_prompt("<s>a", "b", one) == [1, 5, 3, 4, 0]


async def test_a_model_without_a_row_for_a_token_does_not_get_it(tmp_path: Path) -> None:
    one = load(tmp_path, words(), {"vocab_size": 5}, sep_token="<sep>", cls_token="<cls>")
    assert await one.encode("<sep>", add_special_tokens=False) == [4]
    assert one.id_of("<cls>") is None
    assert load(tmp_path, words(), sep_token="<sep>", cls_token="<cls>").id_of("<cls>") == 5


async def test_special_tokens_in_a_text_may_be_text(tmp_path: Path) -> None:
    one = load(tmp_path, words(""), split_special_tokens=True)
    assert await one.encode("<s>", add_special_tokens=False) == [0, 0, 0]


def test_a_class_names_tokens_that_no_file_names(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizerFast", "chat_template": "{{ bos_token }}|"}
    one = load(tmp_path, words(), **config)
    assert one.template.render(USER, {}) == "<s>|"
    assert one.eos_ids == {2}
    other = load(tmp_path, words(), **config, bos_token=None, eos_token="b")
    assert (other.template.render(USER, {}), other.eos_ids) == ("|", {3})


def test_the_end_is_what_any_file_says(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    config = {"eos_token_id": 5, "text_config": {"eos_token_id": [6]}}
    assert load(tmp_path, words(), config).eos_ids == {2, 5, 6, 7, 8}


def test_with_tools_the_template_for_tools_is_taken(tmp_path: Path) -> None:
    named = {"default": "D", "tool_use": "{{ tools | length }} tools"}
    one = load(tmp_path, words(), chat_template=named)
    assert one.template.render(USER, {}) == "D"
    assert one.template.render(USER, {}, [{"type": "function"}]) == "1 tools"


def test_a_model_with_a_template_for_tools_only_says_so(tmp_path: Path) -> None:
    one = load(tmp_path, words(), chat_template={"tool_use": "T"})
    assert one.template.render(USER, {}, [{"type": "function"}]) == "T"
    with pytest.raises(InvalidRequestError, match="tool_use and no default one"):
        one.template.render(USER, {})


SEQUENCES = {
    "alone": decoders.ByteLevel(),
    "in a sequence": decoders.Sequence([decoders.ByteLevel()]),
    "joined": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "among others": decoders.Sequence([decoders.Replace("|", "/"), decoders.ByteLevel()]),
}


@pytest.mark.parametrize("name", SEQUENCES)
async def test_byte_letters_are_bytes_wherever_their_decoder_is(name: str, tmp_path: Path) -> None:
    backend = letters()
    backend.decoder = SEQUENCES[name]
    backend.add_tokens([AddedToken("日本"), AddedToken("<a>")])
    one = load(tmp_path, backend)
    ids = await one.encode("é 東日本|<a>", add_special_tokens=False)
    whole = backend.decode(ids)
    detokenizer = one.detokenizer()
    assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.flush()]) == whole
    assert await one.decode(ids) == whole
    assert b"".join(map(one.bytes_of, ids)) == "é 東日本|<a>".encode()


async def test_an_added_token_of_byte_letters_is_written_as_it_is(tmp_path: Path) -> None:
    backend = letters()
    added = ["été", "Ġ!", "naïve", "日本"]
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    one = load(tmp_path, backend)
    draw = random.Random(5)
    for _ in range(200):
        text = "".join(draw.choices([*added, "ü", "x ", "東", "Ġ"], k=6))
        ids = await one.encode(text, add_special_tokens=False)
        detokenizer = one.detokenizer()
        assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.flush()]) == text
        assert await one.decode(ids) == one.decode_few(ids) == text
        assert b"".join(map(one.bytes_of, ids)) == text.encode()
    assert await one.decode(ids * 1000) == text * 1000


async def test_a_byte_letter_that_is_marked_as_added_stays_a_byte(tmp_path: Path) -> None:
    backend = letters()
    backend.add_tokens([AddedToken("Ã")])
    one = load(tmp_path, backend)
    assert one.bytes_of(one.ids_of("é")[0]) == b"\xc3"
    assert await one.decode(one.ids_of("é")) == "é"
