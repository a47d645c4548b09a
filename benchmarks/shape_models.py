"""Tiny models of one form that differ in how many layers they have.

    python -m benchmarks.shape_models FOLDER LAYERS...

writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

LAYERS = (2, 4)
VOCAB_SIZE = 512

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def name_of(num_layers: int) -> str:
    return f"{num_layers}-layers"


def write_model(folder: Path, num_layers: int) -> Path:
    """Random weights in bfloat16. Not for a process that serves it: patches come before the
    model's module is imported."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3
    from mlx_lm.utils import save_config, save_model

    path = folder / name_of(num_layers)
    mx.random.seed(num_layers)
    config = CONFIG | {"num_hidden_layers": num_layers}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.load_weights(
        [
            (name, _random(name, old))
            for name, old in cast(list[tuple[str, Any]], tree_flatten(model.parameters()))
        ]
    )
    path.mkdir(parents=True)
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


def _random(name: str, old: Any) -> Any:
    import mlx.core as mx

    if name.endswith("norm.weight"):
        return mx.ones(old.shape, mx.bfloat16)
    return mx.random.normal(old.shape, mx.bfloat16) * old.shape[-1] ** -0.5


if __name__ == "__main__":
    for number in sys.argv[2:]:
        write_model(Path(sys.argv[1]), int(number))
    print("written")
