"""NOSA: a Llama whose tokens have an importance, and whose queries visit the most important blocks beside their own.

Each layer has two tensors more, under the names and with the shapes of the released checkpoints: ``self_attn.A
[Hkv]`` and ``self_attn.delta.weight [Hkv, Hkv * D]``. The importance of a token, ``A * softplus(delta(v))``, is added
to the scores of its key; of the blocks that a query visits, `agnostic_topk` are the most important ones, whatever the
query, so that adjacent steps of decoding visit mostly the same. Trains a small model on text whose beginning answers
its end, packages it, and generates, prompt and steps both sparse. Source: arXiv 2510.13602, openbmb/NOSA-8B.

    pip install 'infllm-pass[hf]'
    python examples/nosa.py [STEPS]
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

ALIGNED = 8
"""Numbers that a cached key is longer by, the importance first: rows stay aligned in memory."""


class NosaConfig(LlamaConfig):
    """A Llama's configuration; ``sparse_config`` holds the fields of `SparseAttentionConfig`."""

    model_type = "nosa_llama"


class NosaAttention(LlamaAttention):
    """A Llama's attention with the importance of each key added to its scaled scores.

    Parameters: ``A [Hkv]``, zeros at first, and ``delta``, from a token's values of all heads to a number a head.
    """

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_key_value_heads
        self.A = nn.Parameter(torch.zeros(heads))
        self.delta = nn.Linear(heads * self.head_dim, heads, bias=config.attention_bias)

    def importance(self, values: Tensor) -> Tensor:
        """Importance of tokens from their values ``[B, Hkv, L, D]``: ``[B, Hkv, L]``."""
        return (self.A * F.softplus(self.delta(values.transpose(1, 2).flatten(2)))).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """As in a Llama. A cache holds a key's importance behind the key: it is of the same sequence, row and beam."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        importance = self.importance(value)
        if cache is not None:
            longer = torch.cat([key, F.pad(importance[..., None], (0, ALIGNED - 1))], -1)
            longer, value = cache.update(longer, value, self.layer_idx)
            key, importance = longer[..., : self.head_dim], longer[..., self.head_dim]
        group = self.num_key_value_groups
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        bias = importance.repeat_interleave(group, 1)[:, :, None]
        scores = query @ key.mT * self.scaling + bias + attention_mask
        out = scores.softmax(-1) @ value
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class NosaForCausalLM(LlamaForCausalLM):
    """A Llama with `NosaAttention`; loads released checkpoints as they are."""

    config_class = NosaConfig

    def __init__(self, config: LlamaConfig) -> None:
        config._attn_implementation = "eager"  # a mask for every call, as numbers
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = NosaAttention(config, index)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NosaAttention):
            nn.init.zeros_(module.A)


AutoConfig.register(NosaConfig.model_type, NosaConfig)
AutoModelForCausalLM.register(NosaConfig, NosaForCausalLM)
