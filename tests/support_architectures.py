"""A tiny model with random float32 weights of every architecture that mlx-lm 0.32.2 knows, made in memory.

The list is data: what a configuration needs beside `SHARED`. Windows are short, so that prompts outgrow them.
"""

import importlib
from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

VOCABULARY_SIZE = 96
WINDOW = 24
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "layernorm_epsilon": 1e-6,
    "layer_norm_epsilon": 1e-6,
    "norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": WINDOW,
    "rope_scaling": None,
}
LAYERS = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "num_dense_layers": 1,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
}
INDEXED: dict[str, Any] = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 32}
GATED_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "linear_allow_neg_eigval": True,
}
STATE_SPACE: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "ssm_state_size": 8,
    "state_size": 8,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": [0.001, 100.0],
}
SCALES: dict[str, Any] = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
HYBRID_35: dict[str, Any] = {**GATED_DELTA, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
GEMMA_3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
    "rope_local_base_freq": 10_000.0,
    "final_logit_softcapping": 30.0,
    "layer_types": LAYERS * 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
GEMMA_4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": LAYERS * 2,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
    "hidden_size_per_layer_input": 8,
    "tie_word_embeddings": True,
}
LLAMA_4: dict[str, Any] = {
    **EXPERTS,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": WINDOW,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": True,
    "no_rope_layers": [1, 1, 1, 0],
    "attn_temperature_tuning": 4,
    "floor_scale": 64,
    "attn_scale": 0.1,
}
MINISTRAL: dict[str, Any] = {
    "rope_parameters": {
        **ROPE,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    },
    "layer_types": LAYERS,
}
LFM: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
LINEAR_KIMI: dict[str, Any] = {
    **EXPERTS,
    **LATENT,
    "q_lora_rank": None,
    "model_max_length": 2048,
    "num_experts_per_token": 2,
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
LONGCAT: dict[str, Any] = {
    **LATENT,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 48,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 16,
    "n_routed_experts": 4,
    "zero_expert_num": 1,
    "num_layers": 2,
    "routed_scaling_factor": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

CONFIGURATIONS: dict[str, Mapping[str, Any]] = {
    "Klear": EXPERTS,
    "afm7": {"hidden_dim": 32, "num_layers": 2, "num_kv_reuse_layers": 1, "num_heads": 2, "num_kv_heads": 1},
    "afmoe": {**EXPERTS, "layer_types": LAYERS},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {
        **EXPERTS,
        **LATENT,
        "layer_group_size": 2,
        "group_norm_size": 1,
        "partial_rotary_factor": 0.5,
    },
    "bailing_moe": EXPERTS,
    "bailing_moe_linear": {**EXPERTS, "layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_v3": {**EXPERTS, **LATENT, "layer_group_size": 2, "num_hidden_layers": 2},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    },
    "deepseek": EXPERTS,
    "deepseek_v2": {
        **EXPERTS,
        **LATENT,
        "topk_method": "gready",
        "rope_scaling": {"type": "yarn", "factor": 2.0},
    },
    "deepseek_v3": {**EXPERTS, **LATENT},
    "deepseek_v32": {**EXPERTS, **LATENT, **INDEXED},
    "dots1": EXPERTS,
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"use_bias": False, "moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2},
    "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {**EXPERTS, "layer_types": LAYERS, "is_moe_layer": [False, True]},
    "falcon_h1": STATE_SPACE,
    "gear": {"num_hidden_layers": 3, "layer_types": ["conv_mixer", *LAYERS]},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16.0, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2 (ungrouped)": {"query_pre_attn_scalar": 16.0, "num_key_value_heads": 2},
    "gemma3": {
        "text_config": {**SHARED, "model_type": "gemma3_text", "sliding_window_pattern": 2},
    },
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16.0},
    "gemma3n": {"text_config": {**SHARED, "model_type": "gemma3n_text", **GEMMA_3N}},
    "gemma4": {"text_config": {**SHARED, "model_type": "gemma4_text", **GEMMA_4}},
    "gemma4_text": GEMMA_4,
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {**EXPERTS, "use_qk_norm": True},
    "glm4_moe_lite": {**EXPERTS, **LATENT},
    "glm_moe_dsa": {**EXPERTS, **LATENT, **INDEXED, "rope_parameters": ROPE},
    "gpt2": {"n_ctx": 2048, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 2048},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_inner": 48, "n_head": 2, "n_positions": 2048},
    "gpt_neox": {"rotary_emb_base": 10_000, "rotary_pct": 0.5, "num_key_value_heads": 2},
    "gpt_oss": {**EXPERTS, "layer_types": LAYERS},
    "gptj": {"n_embd": 32, "n_positions": 2048, "n_head": 2, "rotary_dim": 8, "n_layer": 2},
    "granite": SCALES,
    "granitemoe": {**SCALES, **EXPERTS},
    "granitemoehybrid": {
        **SCALES,
        **EXPERTS,
        **STATE_SPACE,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
    },
    "helium": {},
    "hunyuan": {
        **EXPERTS,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": {"bias": False},
    "internlm3": {},
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        **EXPERTS,
        **STATE_SPACE,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": {**SHARED, "model_type": "deepseek_v3", **EXPERTS, **LATENT}},
    "kimi_linear": LINEAR_KIMI,
    "kimi_vl": {"text_config": {**SHARED, "model_type": "deepseek_v3", **EXPERTS, **LATENT}},
    "laguna": {
        **EXPERTS,
        "layer_types": LAYERS,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2": LFM,
    "lfm2-vl": {"text_config": {**SHARED, "model_type": "lfm2", **LFM}},
    "lfm2_moe": {**EXPERTS, **LFM, "use_expert_bias": True},
    "lille-130m": {"block_size": 2048, "n_embd": 64, "n_head": 2, "n_kv_heads": 1, "n_layer": 2},
    "llama": {},
    "llama (windowed)": {"layer_types": LAYERS},
    "llama (long)": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama4": {"text_config": {**SHARED, "model_type": "llama4_text", **LLAMA_4}},
    "llama4_text": LLAMA_4,
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mamba": {**STATE_SPACE, "intermediate_size": 64},
    "mamba2": {**STATE_SPACE, "num_heads": 4, "head_dim": 16, "intermediate_size": 64},
    "mellum": {
        **EXPERTS,
        "layer_types": LAYERS,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "mimo": {},
    "mimo_v2_flash": {
        **EXPERTS,
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "n_shared_experts": None,
        "swa_rope_theta": 10_000.0,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "v_head_dim": 16,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 1.0, "num_key_value_heads": 2},
    "minicpm3": {
        **LATENT,
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 1.0,
        "rope_scaling": {"original_max_position_embeddings": 2048},
    },
    "minimax": {**EXPERTS, "shared_intermediate_size": 16, "rotary_dim": 8},
    "ministral3": MINISTRAL,
    "mistral3": {"text_config": {**SHARED, "model_type": "ministral3", **MINISTRAL}},
    "mistral3 (llama)": {"text_config": {**SHARED, "model_type": "mistral"}},
    "mistral3 (mistral4)": {
        "text_config": {
            **SHARED,
            **EXPERTS,
            **LATENT,
            "model_type": "mistral4",
            "rope_parameters": MINISTRAL["rope_parameters"],
        }
    },
    "mistral4": {**EXPERTS, **LATENT, "rope_parameters": MINISTRAL["rope_parameters"]},
    "mixtral": EXPERTS,
    "muse_glimmer": {"layer_types": LAYERS},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "nemotron_h": {**EXPERTS, **STATE_SPACE, "hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo2": {},
    "olmo3": {"layer_types": LAYERS},
    "olmo_hybrid": {**GATED_DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "olmoe": EXPERTS,
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 32,
        "ffn_dim_divisor": 8,
        "num_query_heads": [2, 2],
        "num_kv_heads": [1, 1],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phi3 (long)": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
    },
    "phimoe": {
        **EXPERTS,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    },
    "phixtral": {
        "num_vocab": VOCABULARY_SIZE,
        "model_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "pixtral": {"text_config": {**SHARED, "model_type": "mistral"}},
    "plamo": {"n_shared_head": 1},
    "plamo2": {
        **STATE_SPACE,
        "hidden_size_per_head": 16,
        "attention_window_size": 2048,
        "mamba_step": 2,
        "full_attention_idx": [],
    },
    "plamo3": {"window_size": WINDOW, "sliding_window_pattern": 2},
    "qwen": {"kv_channels": 16, "intermediate_size": 96},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen2_vl": {"text_config": {**SHARED, "model_type": "qwen2"}},
    "qwen3": {},
    "qwen3 (yarn)": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3_5": {"text_config": {**SHARED, "model_type": "qwen3_5_text", **HYBRID_35}},
    "qwen3_5_moe": {"text_config": {**SHARED, "model_type": "qwen3_5_moe_text", **HYBRID_35, **EXPERTS}},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **GATED_DELTA, "partial_rotary_factor": 0.5},
    "qwen3_vl": {"text_config": {**SHARED, "model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {**SHARED, "model_type": "qwen3_moe", **EXPERTS}},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {**EXPERTS, "use_qk_norm": True},
    "spark2_5": {
        "layer_types": LAYERS,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "starcoder2": {},
    "step3p5": {
        "num_attention_groups": 1,
        "layer_types": LAYERS,
        "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 1},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
        "moe_layers_enum": "1",
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": LATENT,
}


def module_of(name: str) -> str:
    """The module of mlx_lm.models; a word in brackets after it tells two configurations of one apart."""
    return name.partition(" ")[0]


def build(name: str, seed: int = 1, *, configuration: Mapping[str, Any] | None = None) -> Any:
    """A model of `CONFIGURATIONS`, or of another configuration."""
    architecture = module_of(name)
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    configuration = {"model_type": architecture, **(configuration or {**SHARED, **CONFIGURATIONS[name]})}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(configuration))
    model.eval()
    if architecture == "phi3small":
        # It writes to the logits of tokens of its real vocabulary of 100,352, which MLX does without looking.
        model._dummy_tokenizer_ids = mx.array([VOCABULARY_SIZE - 1])
    parameters: list[tuple[str, mx.array]] = cast(Any, tree_flatten(model.parameters()))
    model.update(cast(Any, tree_unflatten([(key, _stirred(value)) for key, value in parameters])))
    mx.eval(model.state)
    return model


def _stirred(weights: mx.array) -> mx.array:
    """Initial weights often are such that a layer adds next to nothing, and no mistake in it would be seen."""
    if weights.dtype != mx.float32:
        return weights
    is_constant = mx.max(weights).item() == mx.min(weights).item()
    return weights + 0.3 * mx.random.normal(weights.shape) if is_constant else weights * 1.5
