"""Vocabularies of ranked byte strings (tiktoken's files, Mistral's tekken.json), made a tokenizer
of ours. A byte string's rank is its id; of two neighbours, those with the lowest joint rank merge
first, as in https://github.com/openai/tiktoken."""

from __future__ import annotations

import ast
import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from mlx_lm_server.parsing.detokenizer import byte_alphabet

# What the code of a model calls the expression that cuts a text into words.
PATTERN_NAMES = frozenset({"pat_str", "PAT_STR"})

# Of a tekken.json from before it listed its own.
TEKKEN_SPECIALS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
)

Ranks = Mapping[bytes, int]


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Returns the ranks of a file that has a byte string in base64 and its rank on each line.
    Raises ValueError."""
    ranks = {}
    for line in data.splitlines():
        if line:
            text, rank = line.split()
            ranks[_from_base64(text)] = int(rank)
    if not ranks:
        raise ValueError("it is empty")
    return ranks


def looks_like_ranks(data: bytes) -> bool:
    """Tells whether a file begins as one of ranks does."""
    try:
        return len(read_ranks(data.partition(b"\n")[0])) == 1
    except ValueError:
        return False


def _from_base64(text: bytes | str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{text!r} is no base64") from error


def read_tekken(data: bytes) -> HFTokenizer:
    """Returns the tokenizer of Mistral's file: special tokens first, then the byte strings, of
    which a config says how many count. Raises ValueError."""
    given = json.loads(data)
    try:
        config, listed = given["config"], given.get("special_tokens")
        if listed is None:
            listed = [{"rank": i, "token_str": t} for i, t in enumerate(TEKKEN_SPECIALS.split())]
        num_specials = config.get("default_num_special_tokens", len(listed))
        num_strings = config.get("default_vocab_size", len(given["vocab"]) + num_specials)
        entries = given["vocab"][: num_strings - num_specials]
        strings = [_from_base64(entry["token_bytes"]) for entry in entries]
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
        pattern = config["pattern"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"it has no {error}") from error
    texts = [named.get(i, f"<SPECIAL_{i}>") for i in range(num_specials)]
    ranks = {string: num_specials + i for i, string in enumerate(strings)}
    return to_tokenizer(ranks, pattern, dict(enumerate(texts)))


def to_tokenizer(
    ranks: Ranks, pattern: str, specials: Mapping[int, str], *, composes: bool = False
) -> HFTokenizer:
    """A tokenizer that cuts a text by a regular expression and merges the bytes of each word.

    `composes` where the text is normalised to NFC before. Raises ValueError for special tokens
    with ids of byte strings.
    """
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    vocab = {_written(string, letters): rank for string, rank in ranks.items()}
    taken = set(ranks.values())
    for token_id, text in specials.items():
        if token_id in taken:
            raise ValueError(f"special token {text!r} has the id {token_id} of a byte string")
        vocab[text] = token_id
    merges = [(_written(a, letters), _written(b, letters)) for a, b in _merges(ranks)]
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut(tokenizer, pattern, composes=composes)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in specials.values()]
    )
    return tokenizer


def cut(tokenizer: HFTokenizer, pattern: str | None, *, composes: bool) -> None:
    """Lets a tokenizer of byte letters cut a text by a regular expression, or as GPT-2 does."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = letters
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()


def _written(string: bytes, letters: Mapping[int, str]) -> str:
    return "".join([letters[byte] for byte in string])


def _merges(ranks: Ranks) -> Iterator[tuple[bytes, bytes]]:
    """Every way to make a byte string of two, those of the lowest rank first."""
    for string in sorted(ranks, key=ranks.__getitem__):
        cuts = [(string[:i], string[i:]) for i in range(1, len(string))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def pattern_of_code(folder: Path) -> str | None:
    """The expression that the folder's own Python code cuts a text by, read off the code without
    running it; None where there is none, or more than one."""
    found = {text for tree in _code(folder) for text in _patterns(tree)}
    return found.pop() if len(found) == 1 else None


def code_composes(folder: Path) -> bool:
    """Tells whether the folder's own code normalises a text to NFC."""
    return any(_is_nfc(node) for tree in _code(folder) for node in ast.walk(tree))


def _code(folder: Path) -> Iterator[ast.Module]:
    for path in sorted(folder.glob("*tokeniz*.py")):
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue


def _is_nfc(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="normalize"), args=[ast.Constant(value="NFC"), _]):
            return True
    return False


def _patterns(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets, value=value):
                names = [_name(target) for target in targets]
            case ast.AnnAssign(target=target, value=value):
                names = [_name(target)]
            case ast.keyword(arg=arg, value=value):
                names = [arg]
            case _:
                continue
        if PATTERN_NAMES.intersection(names) and (text := _constant(value)) is not None:
            yield text


def _name(target: ast.expr) -> str | None:
    match target:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def _constant(node: ast.expr | None) -> str | None:
    """The text that an expression of literals stands for: one, a sum, or several joined."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined("", [left, right])
        case ast.Call(
            func=ast.Attribute(value=between, attr="join"),
            args=[ast.List(elts=parts) | ast.Tuple(elts=parts)],
        ):
            separator = _constant(between)
            return None if separator is None else _joined(separator, parts)
    return None


def _joined(separator: str, parts: Sequence[ast.expr]) -> str | None:
    texts = [_constant(part) for part in parts]
    known = [text for text in texts if text is not None]
    return separator.join(known) if len(known) == len(texts) else None
