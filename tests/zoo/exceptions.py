"""What the generic shrinker gets wrong, architecture by architecture; ``default``: arguments of the first config."""

from __future__ import annotations

from typing import Any

_BLT_LOCAL = {"hidden_size_global": 64, "num_key_value_heads": 4, "intermediate_size": 48}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 16,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 4,
    "hc_lowrank": 16,
}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {**_BLT_LOCAL, "num_hidden_layers": 1},
        "decoder_config": {**_BLT_LOCAL, "num_hidden_layers": 1},
        "global_config": {"num_key_value_heads": 4},
        "encoder_hash_byte_group_vocab": 128,
        "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    # Unit-norm queries, scaled by 1 / initializer_range squared: float32 could not order the blocks.
    "dory": {"initializer_range": 1.0},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_output_size": 64},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {
        "num_hidden_layers": 1,
        "num_layers_per_stack": None,
        "H_cycles": 1,
        "L_cycles": 1,
        "L_bp_cycles": [1],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "num_heads": 8, "n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "hash_seed": 0,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (24, 40),
        "attn_layers": ("local", "lsh"),
        "num_buckets": 8,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "roc_bert": {
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 96),
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}

PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Architectures whose causal language model takes a part of their configuration."""

FLOAT32 = ("inkling2_text", "xglm")
"""Architectures whose own code mixes float32 tensors with the parameters."""

UNCACHED = ("blt", "xlstm")
"""Architectures whose caches do not fit a small configuration: they are called without."""

UNUSABLE = {
    "gemma3n": "its vision tower needs the timm package; gemma3n_text is its language model",
    "gemma4_assistant": "a draft model: it attends to keys and values that another model hands it",
    "gemma4_unified_assistant": "a draft model: it attends to keys and values that another model hands it",
}
"""Architectures that are no language model by themselves, or need more than transformers."""
