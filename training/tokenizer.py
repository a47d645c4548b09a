"""Trains nano's byte-level BPE tokenizer: `python -m training.tokenizer`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import conversation, plain_text
from .model import VOCAB_SIZE
from .words import COMMON, NAMES, SMALL

NANO_FOLDER = Path(__file__).parents[1] / "src" / "mlx_lm_server" / "nano"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<tools>", "</tools>",
)  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts(seed: int, conversations: int) -> Iterator[str]:
    """What the merges are learnt from, without the tags."""
    rng = random.Random(seed)
    for word in (*COMMON, *SMALL, *NAMES):
        yield f" {word} {word}\n{word}\n{word.capitalize()} {word.capitalize()}"
    for _ in range(conversations):
        text = "".join(part.text for parts in conversation(rng, 3) for part in parts)
        for tag in (*SPECIALS, *TAGS):
            text = text.replace(tag, "\n")
        yield text
        yield plain_text(rng)


def train_tokenizer(seed: int = 1, conversations: int = 20000) -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TAGS),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, conversations), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """Every token as the tokenizer writes it, in the order of the ids."""
    numbers = tokenizer.get_vocab()
    return sorted(numbers, key=numbers.__getitem__)


def tokenizer_config(chat_template: str) -> dict[str, object]:
    """What transformers reads beside tokenizer.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def write_tokenizer_config(folder: Path) -> None:
    """Write tokenizer_config.json with the template that lies in the folder."""
    config = tokenizer_config((folder / "chat_template.jinja").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Train and write tokenizer.json and tokenizer_config.json of nano."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(NANO_FOLDER / "tokenizer.json"), pretty=False)
    write_tokenizer_config(NANO_FOLDER)
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
