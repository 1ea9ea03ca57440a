"""NOSA: a Llama whose tokens have an importance, and whose queries visit the most important blocks beside their own.

Each layer has two tensors more, under the names and with the shapes of the released checkpoints: ``self_attn.A
[Hkv]`` and ``self_attn.delta.weight [Hkv, Hkv * D]``. The importance of a token, ``A * softplus(delta(v))``, is added
to the scores of its key; of the blocks that a query visits, `agnostic_topk` are the most important ones, whatever the
query, so that adjacent steps of decoding visit mostly the same. Trains a small model on texts whose end repeats
their beginning, exports it, and generates, prompt and steps both sparse. Source: arXiv 2510.13602, openbmb/NOSA-8B.

    pip install 'infllm-pass[hf]'
    python examples/nosa.py [STEPS]
"""

import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import infllm_pass
from infllm_pass import SparseAttentionConfig

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
        return self.A[:, None] * F.softplus(self.delta(values.transpose(1, 2).flatten(2)).transpose(1, 2).contiguous())

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

SPARSE = SparseAttentionConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    window_size=32,
    topk=8,
    dense_len=0,
    lse="exact",
    scorer="pooled",
    agnostic_topk=3,
)
"""`SparseAttentionConfig.nosa` at the size of the example: ten blocks of 16, four forced and three by importance."""

VOCABULARY = 64


def tiny_model(layers: int = 2) -> NosaForCausalLM:
    """A few layers with random weights, from the registered classes."""
    config = AutoConfig.for_model(
        NosaConfig.model_type,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
        sparse_config=SPARSE.to_dict(),
    )
    return AutoModelForCausalLM.from_config(config)


def texts(count: int, length: int = 256) -> Tensor:
    """Random texts, int64 ``[count, length]``, of which a third is common tokens and the end repeats the beginning."""
    ids = torch.randint(VOCABULARY, (count, length))
    ids = torch.where(torch.rand(count, length) < 1 / 3, ids % 8, ids)
    ids[:, length // 2 :] = ids[:, : length - length // 2]
    return ids


def train(model: nn.Module, steps: int) -> list[float]:
    """The loss of every step. Selections have no gradient: `A` and `delta` learn through the bias alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        ids = texts(8)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def static_cache(model: NosaForCausalLM, rows: int, capacity: int) -> StaticCache:
    """A cache of fixed capacity, with room for the importance behind the keys."""
    cache, config = StaticCache(config=model.config, max_cache_len=capacity), model.config
    for layer in cache.layers:
        sizes = (config.head_dim + ALIGNED, config.head_dim)  # of a key and of a value
        layer.lazy_initialization(
            *(model.lm_head.weight.new_empty(rows, config.num_key_value_heads, 0, n) for n in sizes)
        )
    return cache


class Logits(nn.Module):
    """A language model without a cache, as it is exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The logits ``[B, T, vocabulary]`` of tokens ``[B, T]``."""
        return self.model(input_ids=ids, use_cache=False).logits


def exported(model: nn.Module) -> nn.Module:
    """An exported program for texts of any number and length, as a module."""
    lengths = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    return infllm_pass.export(Logits(model), (texts(2),), dynamic_shapes=lengths, config=SPARSE).module()


def main(steps: int = 60, layers: int = 2) -> dict[str, object]:
    """Train, export and generate; what was found."""
    torch.manual_seed(0)
    model = tiny_model(layers)
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), model.config)
    losses = train(sparse, steps)
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps")
    moved = [float(layer.self_attn.A.detach().abs().max()) for layer in model.model.layers]
    print("largest importance amplitude by layer: " + ", ".join(f"{size:.3f}" for size in moved))

    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    sparse = infllm_pass.sparsify(torch.compile(loaded, backend="aot_eager", dynamic=True), loaded.config)
    text = texts(1)
    with torch.no_grad():
        expected = sparse(input_ids=text, use_cache=False).logits
        program = exported(loaded)
        error = float((program(text) - expected).norm() / expected.norm())
    print(f"exported program: relative error of the logits {error:.1e}")

    agreed = {}
    for name, cache in (("dynamic", DynamicCache(config=loaded.config)), ("static", static_cache(loaded, 1, 224))):
        tokens = sparse.generate(text[:, :200], max_new_tokens=24, do_sample=False, cache=cache, pad_token_id=0)
        with torch.no_grad():  # each token is the likeliest one of the text up to it, without a cache
            likeliest = sparse(input_ids=tokens[:, :-1], use_cache=False).logits.argmax(-1)[:, 199:]
        agreed[name] = int((likeliest == tokens[:, 200:]).sum())
        print(f"{name} cache: {agreed[name]} of 24 tokens as without a cache")
    report = infllm_pass.report(sparse)
    print(report)
    return {"losses": losses, "amplitudes": moved, "error": error, "agreed": agreed, "report": report}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
