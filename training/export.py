"""Writes a checkpoint as a folder that mlx-lm loads: `python -m training.export --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .model import SHAPES, Shape
from .tokenizer import NANO_FOLDER

CONTEXT_TOKENS = 4096
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_of(shape: Shape, eos_token_ids: list[int], pad_token_id: int) -> dict[str, Any]:
    """config.json of a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_ids[0],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": CONTEXT_TOKENS,
        "model_type": "qwen3",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
    }


def generation_config(eos_token_ids: list[int], pad_token_id: int) -> dict[str, Any]:
    """generation_config.json; a low temperature, since most skills have one right answer."""
    return {
        "do_sample": True,
        "eos_token_id": eos_token_ids,
        "pad_token_id": pad_token_id,
        "temperature": 0.3,
        "top_k": 20,
        "top_p": 0.95,
    }


def to_mlx_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of mlx-lm's qwen3, in bf16."""
    return {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in state.items()}


def export(state: dict[str, Tensor], shape: Shape, tokenizer_folder: Path, out: Path) -> None:
    """Write weights, configs and the tokenizer's files."""
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(to_mlx_names(state), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # readable for every user of the installed package
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    eos = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    _write_json(out / "config.json", config_of(shape, eos, eos[1]))
    _write_json(out / "generation_config.json", generation_config(eos, eos[1]))
    for name in TOKENIZER_FILES:
        if out.resolve() != tokenizer_folder.resolve():
            shutil.copy(tokenizer_folder / name, out / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Export a checkpoint; by default over the bundled nano."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/nano/last.pt"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="nano")
    parser.add_argument("--out", type=Path, default=NANO_FOLDER)
    args = parser.parse_args()
    state: dict[str, Tensor] = torch.load(args.checkpoint)["model"]
    export(state, SHAPES[args.shape], NANO_FOLDER, args.out)
    print(f"wrote {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
