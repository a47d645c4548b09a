"""Models of the families that mlx-lm has, large enough that a step is arithmetic: random weights,
14 to 35 M parameters, the tokenizer of `benchmarks.models`.

Their configurations are those of the tests' tiny models with larger numbers.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.contract.tiny_configs import tiny_config

from benchmarks.models import SEED, VOCAB_SIZE, default_folder, ensure

FAMILIES = (
    "cohere2",
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "llama4",
    "mamba2",
    "minimax",
    "olmo2",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
)
VERSION = 1  # raised when the files change, so that nobody measures old ones

_LARGE: dict[str, Any] = {
    "attention_chunk_size": 128,
    "block_dim": 512,
    "block_ff_dim": 1536,
    "global_head_dim": 128,
    "head_dim": 64,
    "hidden_size": 512,
    "hidden_size_per_layer_input": 64,
    "intermediate_size": 1536,
    "intermediate_size_mlp": 1536,
    "kv_lora_rank": 128,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 64,
    "mamba_d_head": 64,
    "mamba_d_ssm": 1024,
    "mamba_d_state": 64,
    "mamba_n_heads": 16,
    "moe_intermediate_size": 384,
    "n_routed_experts": 8,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "shared_expert_intermediate_size": 384,
    "shared_intermediate_size": 384,
    "sliding_window": 128,
    "state_size": 64,
    "v_head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
_MLA = {"num_key_value_heads": 8}
_EXPERTS_BY_PLAIN_NAME = {"intermediate_size": 384}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _MLA,
    "gemma4_text": {"num_key_value_heads": 2},
    "glm4_moe_lite": _MLA,
    "gpt_oss": _EXPERTS_BY_PLAIN_NAME,
    "granitemoehybrid": _EXPERTS_BY_PLAIN_NAME,
    "llama4": _EXPERTS_BY_PLAIN_NAME,
    "mamba2": {"num_hidden_layers": 8},
    "minimax": _EXPERTS_BY_PLAIN_NAME,
    "olmo2": {"num_key_value_heads": 8},
    "qwen3_5": {"num_experts": 0},
}


def ensure_family(family: str, folder: Path | None = None) -> Path:
    """The model's folder, built where it is not there."""
    path = (folder or default_folder()) / f"{family}-v{VERSION}-float32"
    ensure(path, partial(_write_model, family))
    return path


def num_parameters(path: Path) -> int:
    return int(json.loads((path / "config.json").read_text())["num_parameters"])


def config_of(family: str) -> dict[str, Any]:
    config = _enlarged(tiny_config(family), _LARGE | _OVERRIDES.get(family, {}))
    return config | {"eos_token_id": 0, "torch_dtype": "float32"}


def _enlarged(config: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """Only what the configuration has; in a nested one, too."""
    found = config | {name: value for name, value in large.items() if name in config}
    if isinstance(nested := config.get("text_config"), dict):
        found["text_config"] = _enlarged(nested, large)
    return found


def _write_model(family: str, path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    mx.random.seed(SEED)
    config = config_of(family)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(_random_like, model.parameters()))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["num_parameters"] = sum(weight.size for weight in weights.values())
    (path / "config.json").write_text(json.dumps(config, indent=2))


def _random_like(weight: Any) -> Any:
    """A matrix keeps the scale of what goes through it; the rest is as the model makes it."""
    import mlx.core as mx

    if weight.ndim == 1:
        return weight
    return mx.random.normal(weight.shape) * weight.shape[-1] ** -0.5
