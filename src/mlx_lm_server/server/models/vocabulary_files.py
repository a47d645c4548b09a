"""The files that a model's vocabulary may be in: tokenizer.json, or what can be made one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, processors

from mlx_lm_server.errors import ModelError
from mlx_lm_server.server.models import byte_ranks
from mlx_lm_server.server.models.model_files import ModelFacts
from mlx_lm_server.server.models.sentencepiece_file import SentencePieceModel, to_tokenizer
from mlx_lm_server.server.models.special_tokens import token_texts

# Qwen's first: its code lists its special tokens, which have no file.
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
MISTRAL_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What leads every text, where code says so and no file.
GLM4_LEADING = ("[gMASK]", "<sop>")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CLASSES = ("", "PreTrainedTokenizer", "LlamaTokenizer")
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SAVE = (
    'python -c "from transformers import AutoTokenizer; '
    "AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
)
CONVERT = (
    "use a conversion of the model that has a tokenizer.json, or make one in an environment with "
    "'transformers<5' and tiktoken: "
    'python -c "from transformers import AutoTokenizer as A; '
    "from transformers.integrations.tiktoken import convert_tiktoken_to_fast as convert; "
    "t = A.from_pretrained('{folder}', trust_remote_code=True); "
    "convert(getattr(t, 'model', None) or t.tokenizer, '{folder}')\""
)


@dataclass(frozen=True)
class Vocabulary:
    """`names` are special tokens by the names that the file itself, or its format, gives them;
    `leading` are those that go before every text."""

    backend: HFTokenizer
    names: Mapping[str, str] = field(default_factory=dict)
    leading: tuple[str, ...] = ()

    def finish(self, tokenizer_config: Mapping[str, Any], named: Mapping[str, str]) -> None:
        """Lets what was converted lead and end a text as tokenizer_config.json says; a
        tokenizer.json says it itself. `named` are the special tokens by name."""
        leading = list(self.leading)
        if tokenizer_config.get("add_bos_token") and "bos_token" in named:
            leading = [named["bos_token"]]
        adds_eos = tokenizer_config.get("add_eos_token") and "eos_token" in named
        ending = [named["eos_token"]] if adds_eos else []
        ids = [(text, self.backend.token_to_id(text)) for text in {*leading, *ending}]
        if ids and all(token_id is not None for _, token_id in ids):
            self.backend.post_processor = processors.TemplateProcessing(
                single=[*leading, "$A", *ending], special_tokens=ids
            )


Reader = Callable[[Path, ModelFacts], Vocabulary]


def read_vocabulary(folder: Path, facts: ModelFacts) -> tuple[Vocabulary, bool]:
    """The folder's vocabulary, and whether it had to be converted.

    Raises ModelError where there is none that can be read, with the command that makes one.
    """
    for pattern, read in READERS:
        for path in sorted(folder.glob(pattern)):
            try:
                return read(path, facts), read is not _tokenizer_json
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
    raise ModelError(
        f"{folder} has no tokenizer.json, and nothing that one can be made of here; where "
        f"transformers reads it, {SAVE.format(folder=folder)} makes one"
    )


def _tokenizer_json(path: Path, facts: ModelFacts) -> Vocabulary:
    backend = HFTokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    return Vocabulary(backend)


def _tekken(path: Path, facts: ModelFacts) -> Vocabulary:
    backend = byte_ranks.read_tekken(path.read_bytes())
    names = {n: text for n, text in MISTRAL_NAMES.items() if backend.token_to_id(text) is not None}
    leads = "bos_token" in names and facts.tokenizer_config.get("add_bos_token") is not False
    return Vocabulary(backend, names, (names["bos_token"],) if leads else ())


def _model(path: Path, facts: ModelFacts) -> Vocabulary:
    """A `.model` is SentencePiece's or tiktoken's."""
    data = path.read_bytes()
    if byte_ranks.looks_like_ranks(data):
        return _ranked(data, path, facts)
    try:
        model = SentencePieceModel.parse(data)
    except ValueError as error:
        raise ModelError(
            f"{path} cannot be read as a SentencePiece model: {error}; where transformers reads "
            f"it, {SAVE.format(folder=path.parent)} makes a tokenizer.json"
        ) from error
    given = token_texts(facts.tokenizer_config)
    kept = {piece.text for i, piece in enumerate(model.pieces) if i not in given}
    names = {i: text for i, text in given.items() if text not in kept}
    is_llama = _class(facts) == "LlamaTokenizer" and facts.model_type == "llama"
    is_legacy = facts.tokenizer_config.get("legacy", not is_llama)
    if facts.tokenizer_config.get("add_prefix_space") is False:
        model = replace(model, adds_dummy_prefix=False)
    backend = to_tokenizer(model, names, prefixes_every_part=is_legacy is not False)
    texts = {name: str(backend.id_to_token(i)) for name, i in model.named_ids.items()}
    return Vocabulary(backend, texts)


def _tiktoken(path: Path, facts: ModelFacts) -> Vocabulary:
    return _ranked(path.read_bytes(), path, facts)


def _ranked(data: bytes, path: Path, facts: ModelFacts) -> Vocabulary:
    ranks, folder = byte_ranks.read_ranks(data), path.parent
    kind = _class(facts)
    pattern = byte_ranks.pattern_of_code(folder)
    if pattern is None and kind in LLAMA3_CLASSES:
        pattern = LLAMA3_PATTERN
    given, first = token_texts(facts.tokenizer_config), max(ranks.values()) + 1
    if not given and kind == "QWenTokenizer":
        given = dict(enumerate(QWEN_SPECIALS, first))
    if pattern is None or not given:
        unknown = "which special tokens it has" if pattern else "how it cuts a text into words"
        raise ModelError(
            f"{path}: {unknown} is in code that is not run here; {CONVERT.format(folder=folder)}"
        )
    specials = {
        i: given.get(i, f"<|reserved_token_{i}|>") for i in range(first, max(given, default=0) + 1)
    }
    backend = byte_ranks.to_tokenizer(
        ranks, pattern, specials, composes=byte_ranks.code_composes(folder)
    )
    leads = kind == "ChatGLM4Tokenizer" and all(text in specials.values() for text in GLM4_LEADING)
    return Vocabulary(backend, leading=GLM4_LEADING if leads else ())


def _vocab_json(path: Path, facts: ModelFacts) -> Vocabulary:
    """GPT-2's two files; how a text is cut into words is known by the class's name."""
    kind = _class(facts)
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise ModelError(
            f"{path}: how {kind or 'its tokenizer'} cuts a text into words is not known here; "
            f"where transformers reads it, {SAVE.format(folder=path.parent)} makes a tokenizer.json"
        )
    backend = HFTokenizer(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
    if kind == "Qwen2Tokenizer":
        byte_ranks.cut(backend, QWEN2_PATTERN, composes=True)
    else:
        byte_ranks.cut(backend, None, composes=False)
    return Vocabulary(backend)


def _class(facts: ModelFacts) -> str:
    return str(facts.tokenizer_config.get("tokenizer_class") or "").removesuffix("Fast")


READERS: tuple[tuple[str, Reader], ...] = (
    ("tokenizer.json", _tokenizer_json),
    ("tekken.json", _tekken),
    ("tiktoken.model", _tiktoken),
    ("*.tiktoken", _tiktoken),
    ("tokenizer.model", _model),
    ("*.model", _model),
    ("vocab.json", _vocab_json),
)
