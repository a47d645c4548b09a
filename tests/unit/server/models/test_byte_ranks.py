"""tiktoken is the measure: the same ids for any text."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mlx_lm_server.parsing.detokenizer import byte_alphabet
from mlx_lm_server.server.models import byte_ranks
from mlx_lm_server.server.models.vocabulary_files import LLAMA3_PATTERN, QWEN2_PATTERN

LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
HAN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+(?i:'s|'ll)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*(?i:'s|'ll)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"Llama 3": LLAMA3_PATTERN, "Qwen": QWEN2_PATTERN, "Kimi": HAN}
TEXT = (
    "the cat's SAT on mat THEY'LL hello World 12345 x=1; foo(bar) Zwölf größe naïve 東京 日本語 "
    "中文English混合 テスト привет мир aaa aaaaaa ababab 🥊 é"
)
WORDS = TEXT.split()
ODD = [*"ab c'sXY12\n\r\t .,!;<>/é東한ﬁÀ\u0301\u200d\u00a0\u3000", "'LL", "ſ", "İ", "٣", "〇", "ー"]


def ranks_of(pattern: str) -> dict[bytes, int]:
    draw, letters = random.Random(1), byte_alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(draw.choices(WORDS, k=1500))], trainer)
    return {bytes([letters[x] for x in k]): i for k, i in tokenizer.get_vocab().items()}


def texts(num: int) -> list[str]:
    draw = random.Random(2)
    sizes = [(draw.choice(["", " "]), draw.randrange(14)) for _ in range(num)]
    return [between.join(draw.choices([*WORDS, *ODD], k=size)) for between, size in sizes]


def file_of(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(text) + b" %d\n" % rank for text, rank in ranks.items())


def tekken_of(ranks: dict[bytes, int], pattern: str, **config: Any) -> dict[str, Any]:
    strings = sorted(ranks, key=ranks.__getitem__)
    encoded = [base64.b64encode(string).decode() for string in strings]
    return {
        "config": {"pattern": pattern, **config},
        "vocab": [{"rank": i, "token_bytes": text} for i, text in enumerate(encoded)],
        "special_tokens": [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>"])],
    }


@pytest.mark.parametrize("family", PATTERNS)
def test_a_text_gets_the_ids_that_tiktoken_gives_it(family: str) -> None:
    ranks = ranks_of(PATTERNS[family])
    specials = {"<|end|>": len(ranks), "[BOS]": len(ranks) + 1}
    theirs = tiktoken.Encoding(
        "x", pat_str=PATTERNS[family], mergeable_ranks=ranks, special_tokens=specials
    )
    ours = byte_ranks.to_tokenizer(
        byte_ranks.read_ranks(file_of(ranks)),
        PATTERNS[family],
        {i: text for text, i in specials.items()},
    )
    for text in texts(2000):
        for whole in (text, f"{text}<|end|>{text}"):
            ids = theirs.encode(whole, allowed_special="all")
            assert ours.encode(whole).ids == ids, whole
            assert ours.decode(ids, skip_special_tokens=False) == whole


def test_a_tekken_has_its_special_tokens_first() -> None:
    ranks = ranks_of(HAN)
    theirs = tiktoken.Encoding("x", pat_str=HAN, mergeable_ranks=ranks, special_tokens={})
    given = tekken_of(ranks, HAN, default_num_special_tokens=5, default_vocab_size=len(ranks) + 3)
    ours = byte_ranks.read_tekken(json.dumps(given).encode())
    assert ours.get_vocab_size() == len(ranks) + 3
    assert [ours.id_to_token(i) for i in range(5)] == [
        *("<unk>", "<s>"),
        *(f"<SPECIAL_{i}>" for i in range(2, 5)),
    ]
    for text in texts(300):
        ids = [i + 5 for i in theirs.encode(text)]
        if max(ids, default=0) < len(ranks) + 3:  # the last two byte strings do not count
            assert ours.encode(text).ids == ids, text
    assert ours.encode("<s>a").ids[0] == 1


def test_an_old_tekken_has_the_special_tokens_of_its_time() -> None:
    given = tekken_of(ranks_of(HAN), HAN, default_num_special_tokens=1000)
    del given["special_tokens"]
    ours = byte_ranks.read_tekken(json.dumps(given).encode())
    names = ["[TOOL_CALLS]", "[TOOL_CONTENT]", "<SPECIAL_999>"]
    assert [ours.token_to_id(name) for name in names] == [9, 19, 999]


@pytest.mark.parametrize("data", [b"{}", b"[]", b'{"config": {}, "vocab": []}', b"x"])
def test_what_is_no_tekken_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it has no|Expecting"):
        byte_ranks.read_tekken(data)


@pytest.mark.parametrize("data", [b"", b"YQ==", b"YQ== x", b"Y 1", b"a b c"])
def test_what_is_no_file_of_ranks_is_a_value_error(data: bytes) -> None:
    assert not byte_ranks.looks_like_ranks(data)
    with pytest.raises(ValueError):
        byte_ranks.read_ranks(data)


def test_a_special_token_cannot_have_the_id_of_a_byte_string() -> None:
    with pytest.raises(ValueError, match="byte string"):
        byte_ranks.to_tokenizer({b"a": 0}, "a", {0: "<s>"})


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('PAT_STR = r"""a+|b"""', "a+|b"),
        ('class T:\n    pat_str = "|".join([r"a", "b" + "c"])', "a|bc"),
        ('class T:\n    pat_str: str = "a"', "a"),
        ('x = Encoding(name="n", pat_str="a")', "a"),
        ('class T:\n    def f(self):\n        self.pat_str = "a"\n        g(pat_str=self.x)', "a"),
        ('pat_str = "a"\nPAT_STR = "a"', "a"),
        ('pat_str = "a"\nPAT_STR = "b"', None),
        ("pat_str = f()", None),
        ('pat_str = "|".join(f())', None),
        ('pat_str = "a" + f()', None),
        ('other = "a"', None),
        ("no python", None),
    ],
)
def test_the_expression_is_read_off_the_code_and_the_code_is_not_run(
    tmp_path: Path, code: str, found: str | None
) -> None:
    mark = tmp_path / "ran"
    text = f"{code}\nopen({str(mark)!r}, 'w').close()\n"
    (tmp_path / "tokenization_x.py").write_text(text)
    (tmp_path / "modeling_x.py").write_text('pat_str = "m"')
    assert byte_ranks.pattern_of_code(tmp_path) == found
    assert not mark.exists()


def test_code_that_composes_a_text_is_known(tmp_path: Path) -> None:
    code = tmp_path / "tokenization_x.py"
    code.write_text("text = unicodedata.normalize('NFD', text)")
    assert not byte_ranks.code_composes(tmp_path)
    code.write_text("text = unicodedata.normalize('NFC', text)")
    assert byte_ranks.code_composes(tmp_path)
