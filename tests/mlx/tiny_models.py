"""Tiny random models, one for each family that is served, written as a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from tests.contract.tiny_configs import VOCAB_SIZE, tiny_config

__all__ = ["CONFIGS", "VOCAB_SIZE", "WIDE_HEADS", "write_adapter", "write_model"]

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "eos_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "llama": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4, "head_dim": 32},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "phi3": {
        "model_type": "phi3",
        "original_max_position_embeddings": 1024,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.1] * 8,
        },
    },
}


# What gives heads of at least 32 numbers, which is the least that quantised KV takes.
WIDE_HEADS: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"hidden_size": 128},
    "deepseek_v3": {"qk_rope_head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64},
    "gpt_oss": {"head_dim": 32},
    "qwen3": {"head_dim": 64},
    "qwen3_next": {"head_dim": 32},
}


def write_model(
    family: str,
    folder: Path,
    bits: int | None = None,
    seed: int = 0,
    has_wide_heads: bool = False,
    dtype: mx.Dtype = mx.float32,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A model folder with config.json and model.safetensors; quantised where `bits` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _COMMON | CONFIGS[family] if family in CONFIGS else tiny_config(family)
    if has_wide_heads:
        config |= WIDE_HEADS[family]
    config |= changes or {}
    model = _random_model(config, seed)
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_adapter(model_folder: Path, folder: Path, seed: int = 1) -> Path:
    """A LoRA adapter for a model folder, with weights large enough to change its tokens."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 4,
            "scale": 8.0,
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
        },
    }
    model, _ = load_model(model_folder)
    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    mx.random.seed(seed)
    weights = {
        name: mx.random.normal(value.shape) * 0.15
        for name, value in tree_flatten(model.trainable_parameters())
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _random_model(config: dict[str, Any], seed: int) -> nn.Module:
    from mlx_lm.utils import _get_classes

    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    # Initial weights give nearly flat logits; larger ones make greedy choices clear.
    model.update(tree_map(_widen, model.parameters()))
    mx.eval(model.parameters())
    return model


def _widen(weight: mx.array) -> mx.array:
    return mx.random.normal(weight.shape) * 0.2 if weight.ndim > 1 else weight
