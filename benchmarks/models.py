"""Build the models that the benchmarks serve: random weights, about 30 M parameters.

    python -m benchmarks.models [--folder FOLDER]

The tokenizer knows one token per word, with the space before it, so a prompt of n words has
n tokens. The embeddings of everything else (bytes, special tokens, the end of text among them) are
zero and tied to the output, so such a token is hardly ever drawn and answers run to full length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm_server.bench.words import WORDS

VOCAB_SIZE = 8192
CONTEXT_TOKENS = 16384
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|reserved_{i}|>" for i in range(13)))
NUM_BYTES = 256
NUM_WORDS = VOCAB_SIZE - NUM_BYTES - len(SPECIAL_TOKENS)
SEED = 20
VERSION = 2  # raised when the files change, so that nobody measures old ones

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "torch_dtype": "float32",
}

# Scales stay float32: with bfloat16 ones MLX's quantized matmul on a CPU is eight times slower, and
# that would be a comparison won by the choice of the file.
VARIANTS = {"float32": None, "4bit": {"group_size": 64, "bits": 4}}


def default_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mlx-lm-server" / "bench-models"


def ensure_models(folder: Path | None = None) -> dict[str, Path]:
    """The path of each variant; builds what is not there."""
    folder = folder or default_folder()
    paths = {name: folder / f"qwen3-30m-v{VERSION}-{name}" for name in VARIANTS}
    for name, path in paths.items():
        ensure(path, partial(write_weights, quantization=VARIANTS[name]))
    return paths


def ensure(path: Path, write_model: Callable[[Path], None]) -> None:
    """Build a model with our tokenizer where it is not there; atomic, so that a build cut off
    leaves nothing that looks whole."""
    if (path / "config.json").exists():
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_tokenizer(scratch)
    write_model(scratch)
    shutil.rmtree(path, ignore_errors=True)
    scratch.rename(path)


def vocabulary() -> list[str]:
    """The text of each token id, in the byte alphabet of byte-level BPE (`Ġ` is a space)."""
    syllables = ["".join(s) for s in itertools.product("bcdfghjklmnpqrstuvwxyz", "aeio")]
    made_up = (a + b for a, b in itertools.product(syllables, repeat=2))
    words = dict.fromkeys(itertools.chain(WORDS, made_up))
    chosen = list(itertools.islice(words, NUM_WORDS))
    return [*SPECIAL_TOKENS, *byte_alphabet(), *("Ġ" + word for word in chosen)]


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {text: index for index, text in enumerate(vocabulary())}
    assert len(vocab) == VOCAB_SIZE
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    # A space after a line's end stays with the word, so that an answer in the next prompt has the
    # tokens that were generated.
    words = Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_weights(path: Path, quantization: dict[str, int] | None) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3
    from mlx_lm.utils import quantize_model, save_config, save_model

    mx.random.seed(SEED)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    weights = [(name, random_like(name, old)) for name, old in tree_flatten(model.parameters())]
    model.load_weights(weights)
    config = dict(CONFIG)
    if quantization is not None:
        model, config = quantize_model(model, config, **quantization)
    save_model(path, model)
    save_config(config, path / "config.json")


def random_like(name: str, old: Any) -> Any:
    """Norms are ones; a matrix keeps the scale of what goes through it; the embeddings make the
    logits of words spread by about 3.4 and those of other tokens zero."""
    import mlx.core as mx

    if name.endswith("norm.weight"):
        return mx.ones_like(old)
    if "embed_tokens" not in name:
        return mx.random.normal(old.shape) * old.shape[-1] ** -0.5
    words = mx.arange(VOCAB_SIZE)[:, None] >= VOCAB_SIZE - NUM_WORDS
    return mx.where(words, mx.random.normal(old.shape) * 0.15, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="build the benchmark models")
    parser.add_argument("--folder", type=Path, default=default_folder())
    for name, path in ensure_models(parser.parse_args().folder).items():
        size = sum(f.stat().st_size for f in path.iterdir())
        print(f"{name:8} {size / 2**20:6.0f} MiB  {path}")


if __name__ == "__main__":
    main()
