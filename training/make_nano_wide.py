"""Builds nano-wide: nano's words at the cost of a model of about 100 M parameters.

`python -m training.make_nano_wide --out FOLDER`. Nano's weights stand in the first rows and
columns of larger matrices. What is added is random and its way out (output projections) is scaled
to almost nothing, as is the way out of the extra layers, so the text stays nano's while every step
costs what a real model's step costs. Not shipped; benchmarks build it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

NANO_FOLDER = Path(__file__).parents[1] / "src" / "mlx_lm_server" / "nano"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
ALMOST_NOTHING = 1e-5


@dataclass(frozen=True)
class WideShape:
    """Sizes of the larger model; the number of query heads per kv head stays nano's.

    Four times nano's width: the norms' weights are then halved, which is exact in bf16.
    """

    hidden_size: int = 1024
    num_layers: int = 10
    num_kv_heads: int = 8
    intermediate_size: int = 2048


def wide_config(nano: dict[str, Any], shape: WideShape) -> dict[str, Any]:
    """nano's config at the larger sizes; see `_norm` for the epsilon."""
    per_kv_head = nano["num_attention_heads"] // nano["num_key_value_heads"]
    return {
        **nano,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_kv_heads * per_kv_head,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": nano["rms_norm_eps"] * nano["hidden_size"] / shape.hidden_size,
    }


class Widener:
    """Makes the larger weights, seeded, in bf16."""

    def __init__(self, config: dict[str, Any], nano_hidden: int, seed: int) -> None:
        self.config = config
        self.norm_scale = math.sqrt(nano_hidden / config["hidden_size"])
        self.key = mx.random.key(seed)

    def _random(self, shape: tuple[int, int], scale: float) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return (mx.random.normal(shape, key=key) * scale).astype(mx.bfloat16)

    def _matrix(self, name: str, old: mx.array | None) -> mx.array:
        """A matrix `[out, in]` with the old one in its corner, if there is one."""
        rows, columns = self._sizes(name)
        leads_out = name in ("o_proj", "down_proj")
        new = self._random((rows, columns), ALMOST_NOTHING if leads_out else columns**-0.5)
        if old is None:
            return new
        if not leads_out:
            new[: old.shape[0], old.shape[1] :] = 0
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def _sizes(self, name: str) -> tuple[int, int]:
        c = self.config
        q = c["num_attention_heads"] * c["head_dim"]
        kv = c["num_key_value_heads"] * c["head_dim"]
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        return {
            "q_proj": (q, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, q),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }[name]

    def _norm(self, old: mx.array | None) -> mx.array:
        """A norm over the wider state, whose added part is almost zero.

        The mean square shrinks by nano's share of the width, so the weight makes up for its root.
        """
        new = mx.ones((self.config["hidden_size"],), dtype=mx.bfloat16)
        if old is not None:
            new[: old.shape[0]] = (old.astype(mx.float32) * self.norm_scale).astype(mx.bfloat16)
        return new

    def layer(self, index: int, nano: dict[str, mx.array]) -> dict[str, mx.array]:
        """All weights of one layer."""
        prefix = f"model.layers.{index}."
        out: dict[str, mx.array] = {}
        for part, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                key = f"{prefix}{part}.{name}.weight"
                out[key] = self._matrix(name, nano.get(key))
        for name in ("input_layernorm", "post_attention_layernorm"):
            key = f"{prefix}{name}.weight"
            out[key] = self._norm(nano.get(key))
        for name in ("q_norm", "k_norm"):
            key = f"{prefix}self_attn.{name}.weight"
            ones = mx.ones((self.config["head_dim"],), dtype=mx.bfloat16)
            out[key] = nano.get(key, ones)
        return out

    def weights(self, nano: dict[str, mx.array]) -> dict[str, mx.array]:
        """The whole model; the added columns of the embedding are zero."""
        embedding = nano["model.embed_tokens.weight"]
        missing = self.config["hidden_size"] - embedding.shape[1]
        out = {
            "model.embed_tokens.weight": mx.pad(embedding, [(0, 0), (0, missing)]),
            "model.norm.weight": self._norm(nano["model.norm.weight"]),
        }
        for index in range(self.config["num_hidden_layers"]):
            out |= self.layer(index, nano)
        return out


def build(nano_folder: Path, out: Path, shape: WideShape, seed: int) -> int:
    """Write the model folder; returns the number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    nano_config = json.loads((nano_folder / "config.json").read_text())
    config = wide_config(nano_config, shape)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(nano_folder / name, out / name)
    nano = cast(dict[str, mx.array], mx.load(str(nano_folder / "model.safetensors")))
    weights = Widener(config, nano_config["hidden_size"], seed).weights(nano)
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    return sum(w.size for w in weights.values())


def main() -> None:
    """Build as told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nano", type=Path, default=NANO_FOLDER)
    parser.add_argument("--layers", type=int, default=WideShape.num_layers)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    count = build(args.nano, args.out, WideShape(num_layers=args.layers), args.seed)
    print(f"wrote {args.out}: {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
