"""A model of real size: random weights, 411 M parameters, a vocabulary of 152 000."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.models import (
    END_OF_TEXT,
    SEED,
    SPECIAL_TOKENS,
    byte_alphabet,
    default_folder,
    ensure,
)
from mlx_lm_server.server.models.model_files import NANO_FOLDER

VOCAB_SIZE = 152_000
VERSION = 1  # raised when the files change, so that nobody measures old ones

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "torch_dtype": "bfloat16",
}


def ensure_large_model(folder: Path | None = None) -> Path:
    """Returns the folder of the model, which is built where it is not there."""
    path = (folder or default_folder()) / f"qwen3-411m-v{VERSION}"
    ensure(path, _write)
    return path


def _write(path: Path) -> None:
    write_tokenizer(path)
    _write_weights(path)


def write_tokenizer(path: Path) -> None:
    """Writes a byte-level BPE with as many merges as words, and nano's chat template, which has
    tools and reasoning."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    texts, merges = _vocabulary()
    model = BPE(vocab={text: index for index, text in enumerate(texts)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "chat_template": (NANO_FOLDER / "chat_template.jinja").read_text(),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the texts by id, words of up to three syllables, and the merges that make them."""
    pairs = list(itertools.product("bcdfghjklmnpqrstuvwxyz", "aeio"))
    syllables = ["".join(pair) for pair in pairs]
    one = [("Ġ", syllable) for syllable in syllables]
    two = itertools.product(("Ġ" + syllable for syllable in syllables), syllables)
    three = itertools.product(
        ("Ġ" + "".join(pair) for pair in itertools.product(syllables, repeat=2)), syllables
    )
    plain = [*SPECIAL_TOKENS, *byte_alphabet()]
    longer = itertools.chain(pairs, one, two, three)
    merges = list(itertools.islice(longer, VOCAB_SIZE - len(plain)))
    return [*plain, *(left + right for left, right in merges)], merges


def _write_weights(path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3
    from mlx_lm.utils import save_config, save_model

    mx.random.seed(SEED)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    model.load_weights(
        [(name, _random(name, old)) for name, old in tree_flatten(model.parameters())]
    )
    save_model(path, model)
    save_config(CONFIG, path / "config.json")


def _random(name: str, old: Any) -> Any:
    import mlx.core as mx

    if name.endswith("norm.weight"):
        return mx.ones(old.shape, mx.bfloat16)
    return mx.random.normal(old.shape, mx.bfloat16) * old.shape[-1] ** -0.5
