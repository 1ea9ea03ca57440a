"""A configuration of a Hugging Face architecture with everything that costs time made small.

Sizes are set by the names that configurations give them; what a name means is the same across architectures often
enough for a short table of exceptions (`exceptions`) to do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
LONGEST = 512
WINDOW = 64
"""Sliding windows: longer than the visited span of the small budget, shorter than the tests' sequences."""

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER, _LAYERS, _EXPERTS = 64, 4, 2, 16, 48, 2, 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length"),
        LONGEST,
    ),
    **dict.fromkeys(("original_max_position_embeddings", "max_target_positions", "max_source_positions"), LONGEST),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), _HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "index_n_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), _KV_HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "index_head_dim", "dim_head", "d_head", "kv_channels"), _HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_size"), _HEAD_DIM),
    **dict.fromkeys(("global_head_dim", "query_pre_attn_scalar", "rotary_dim"), _HEAD_DIM),
    "qk_head_dim": 2 * _HEAD_DIM,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_layers_per_stack", "num_blocks"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), _LAYERS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size", "d_inner"), _INNER),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), _INNER),
    **dict.fromkeys(("shared_experts_intermediate_size", "dense_intermediate_size", "feed_forward_size"), _INNER),
    "moe_shared_expert_intermediate_size": _INNER,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "zero_expert_num": 2,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention"), WINDOW),
    **dict.fromkeys(("attention_window_size", "local_attention_window_len", "keep_window_size"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), _HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "d_rel", "router_hidden_size"), 8),
    **dict.fromkeys(("index_topk",), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), _HIDDEN),
    "rel_extent": 32,
    "no_rope_layer_interval": 2,
}
"""The value of every size that the default configuration sets to a number."""

_ALWAYS = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group")
"""Sizes that are set where the default is None as well."""
_ZERO = (
    *("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "activation_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "hidden_dropout", "decoder_layerdrop", "layerdrop"),
    *(
        "resid_dropout",
        "embed_dropout",
        "residual_dropout",
        "embedding_dropout",
        "mlp_dropout",
        "num_nextn_predict_layers",
    ),
    *("num_kv_shared_layers",),
)
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrunk_config(architecture: str, exceptions: Mapping[str, Any]) -> PreTrainedConfig:
    """A small configuration of an architecture.

    Args:
        architecture: its model type.
        exceptions: fields that the shrinker gets wrong; nested mappings belong to sub-configurations.
    """
    kind = CONFIG_MAPPING[architecture]
    return kind(**_fields(kind(**exceptions.get("default", {})), exceptions))


def _fields(config: PreTrainedConfig, exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """The changed fields of a configuration, those of its sub-configurations as nested dictionaries."""
    given = vars(config)
    fields: dict[str, Any] = {}
    nested = {name for name, value in given.items() if isinstance(value, PreTrainedConfig)}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = type(value)(**_fields(value, exceptions.get(name, {})))
        elif name in _SIZES and (isinstance(value, int) or name in _ALWAYS):
            fields[name] = _SIZES[name]
        elif name in _ZERO and value:
            fields[name] = 0 if isinstance(value, int) else 0.0
        elif name.endswith("token_id") and _outside(value):
            fields[name] = VOCABULARY - 1
        elif name == "is_decoder":
            fields[name] = True
    fields |= _per_layer(given)
    if given.get("kv_lora_rank") is not None:
        fields["num_key_value_heads"] = _HEADS
    return fields | {name: value for name, value in exceptions.items() if name != "default" and name not in nested}


def _outside(token: Any) -> bool:
    """Whether a token, or one of several, is not in the small vocabulary."""
    tokens = token if isinstance(token, list) else [token]
    return any(isinstance(one, int) and one >= VOCABULARY for one in tokens)


def _per_layer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer: every kind of layer once, at least `_LAYERS` layers."""
    lists = {name: list(given[name]) for name in _PER_LAYER if isinstance(given.get(name), (list, tuple))}
    if not lists:
        return {}
    kept: list[int] = []
    seen: dict[str, set[Any]] = {name: set() for name in lists}
    for index in range(min(map(len, lists.values()))):
        if any(entries[index] not in seen[name] for name, entries in lists.items()):
            kept.append(index)
            for name, entries in lists.items():
                seen[name].add(entries[index])
    while len(kept) < _LAYERS:
        kept.append(kept[-1])
    fields: dict[str, Any] = {name: [entries[index] for index in kept] for name, entries in lists.items()}
    return fields | {name: len(kept) for name in _LAYER_COUNTS if isinstance(given.get(name), int)}
