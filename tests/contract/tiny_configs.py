"""A tiny configuration for every family that mlx-lm has, made from the family's own `ModelArgs`.

The fields of that dataclass are filled by name from one table; what a family wants differently
stands in `OVERRIDES`. So a family that mlx-lm gains tomorrow gets a configuration too.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

VOCAB_SIZE = 320

# Modules of mlx_lm.models that are no families.
PARTS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}

SMALL: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.25,
    "bos_token_id": 1,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "conv_bias": False,
    "decoder_sparse_step": 1,
    "embedding_multiplier": 1.0,
    "eos_token_id": 0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "kv_lora_rank": 32,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "logits_scaling": 1.0,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "model_max_length": 4096,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_groups": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "num_layers": 4,
    "num_local_experts": 4,
    "d_inner": 128,
    "d_model": 64,
    "model_dim": 64,
    "n_ctx": 4096,
    "n_embd": 64,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 128,
    "n_kv_heads": 2,
    "n_layer": 4,
    "n_layers": 4,
    "n_positions": 4096,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "global_head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "time_step_rank": 8,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_traditional": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 64,
    "sliding_window": 24,
    "sliding_window_size": 24,
    "state_size": 16,
    "tie_word_embeddings": False,
    "time_step_limit": [0.001, 10.0],
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_bias": False,
    "use_conv_bias": True,
    "use_qk_norm": True,
    "v_head_dim": 16,
    "vocab_size": VOCAB_SIZE,
}

SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
_MLA: dict[str, Any] = {"num_key_value_heads": 4, "rope_scaling": None}
_GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 5,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    },
}

_ROPES: dict[str, Any] = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_LLAMA4_ROPE: dict[str, Any] = {
    "rope_theta": 1e4,
    "rope_type": "default",
    "type": "default",
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 64,
}
_LFM2: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_dim": 64,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 64,
}
_LONGCAT: dict[str, Any] = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 64,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 64,
    "n_routed_experts": 2,
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "num_key_value_heads": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 2.0},
    "afmoe": {"layer_types": SLIDING_FULL, "num_dense_layers": 1},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}},
    "ernie4_5_moe": {"moe_num_experts": 4},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LLGL"},
    "exaone_moe": {"layer_types": SLIDING_FULL, "is_moe_layer": [False, True, True, True]},
    "gear": {"layer_types": ["conv_mixer", "full_attention", "sliding_attention", "conv_mixer"]},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma4_text": _GEMMA4,
    "gpt_oss": {"layer_types": SLIDING_FULL, "rope_scaling": None},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING_FULL,
        "activation_sparsity_pattern": [0.5] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
    "qwen3_5": {"num_experts": 0},
    "glm4_moe_lite": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 16},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": _MLA
    | {
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 16,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gptj": {"rotary_dim": 8},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"factor": 1.0, "alpha": 1000.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": _MLA
    | {
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "kda_layers": [1, 3],
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2": _LFM2,
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "lille-130m": {"block_size": 4096},
    "llama4_text": {"no_rope_layers": [1, 1, 0, 1]}
    | {"attention_chunk_size": 24, "interleave_moe_layer_step": 2, "rope_scaling": None}
    | {"num_experts_per_tok": 1},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mellum": {"layer_types": SLIDING_FULL, "rope_parameters": _ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0},
    "minicpm3": {
        "dim_model_base": 64,
        "scale_depth": 1.4,
        "scale_emb": 1.0,
        "num_key_value_heads": 4,
        "rope_scaling": {
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        },
    },
    "minimax": {"rotary_dim": 8},
    "ministral3": {
        "layer_types": SLIDING_FULL,
        "rope_parameters": _LLAMA4_ROPE,
    },
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": n == 2, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.3, "no_op": False, "replace_with_linear": False},
            }
            for n in range(4)
        ]
    },
    "mistral4": _MLA | {"rope_parameters": _LLAMA4_ROPE},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "num_key_value_heads": 4},
    "openelm": {
        "num_transformer_layers": 4,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0, 2.0, 2.0, 1.0],
    },
    "phixtral": {"num_vocab": VOCAB_SIZE, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 16, "intermediate_size": 256},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 24,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "attention"],
    },
    "spark2_5": {"hidden_act": "gelu", "layer_types": SLIDING_FULL, "rope_parameters": _ROPES},
    "stablelm": {"use_qkv_bias": False},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": SLIDING_FULL,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "partial_rotary_factors": [0.5] * 4,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "M"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "llama": {"layer_types": SLIDING_FULL},
    "nanochat": {"num_key_value_heads": 4},
    "olmo2": {"num_key_value_heads": 4},
}


# Families whose language model is another family, in a `text_config`.
LANGUAGE_MODEL_OF = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4_text",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


def families() -> list[str]:
    import mlx_lm.models

    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return sorted(set(names) - PARTS, key=str.lower)


def tiny_config(family: str) -> dict[str, Any]:
    """Raises whatever the family's module raises on import."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    names = {f.name: f for f in dataclasses.fields(module.ModelArgs)}
    filled = {name: value for name, value in SMALL.items() if name in names}
    config = {"model_type": family} | filled | OVERRIDES.get(family, {})
    if "text_config" in names:
        inner = LANGUAGE_MODEL_OF.get(family, family)
        config["text_config"] = SMALL | {"model_type": inner} | OVERRIDES.get(inner, {})
    return config
