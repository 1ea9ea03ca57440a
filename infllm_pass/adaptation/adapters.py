"""Low-rank adapters on a model's linear layers, by PEFT."""

from __future__ import annotations

from typing import Any

import torch

from infllm_pass.adaptation.config import AdaptationConfig


def with_adapters(original: Any, config: AdaptationConfig) -> Any:
    """A model whose weights are fixed, with adapters beside its linear layers: a model of PEFT around it.

    Args:
        original: a causal language model of transformers.
        config: the rank of the adapters, and the seed that they are drawn with.
    """
    import peft

    torch.manual_seed(config.seed)
    chosen = peft.LoraConfig(
        r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(original, chosen)


def whole_model(trained: Any) -> Any:
    """A model of transformers without anything around it; adapters are added to its weights."""
    merge = getattr(trained, "merge_and_unload", None)
    return merge() if callable(merge) else trained


def body_of(trained: Any) -> Any:
    """The part of a causal language model that makes hidden states; of sparsified models the part that runs sparse.

    Args:
        trained: a model of transformers, with adapters of PEFT around it or without.
    """
    inside = trained.base_model.model if hasattr(trained, "peft_config") else trained
    return getattr(inside, inside.base_model_prefix)
