"""Every causal language model of the installed transformers, from small random configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .examination import one_line
from .exceptions import EXCEPTIONS, FLOAT32, PARTS, UNCACHED, UNUSABLE
from .shrink import shrunk_config
from .specimens import Batch, CannotBuildError, Kind, Specimen, roughen

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def architectures() -> list[str]:
    """The model types that transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def specimens(architecture: str) -> Iterator[Specimen]:
    """One specimen for each attention implementation that the architecture has.

    Raises:
        CannotBuildError: it cannot be built or called here; the message says why.
    """
    if architecture in UNUSABLE:
        raise CannotBuildError(UNUSABLE[architecture])
    for implementation in IMPLEMENTATIONS:
        try:
            model = build(architecture, implementation)
        except Exception as error:
            if implementation == "eager":
                raise CannotBuildError(one_line(error)) from error
            continue
        if getattr(model.config, "_attn_implementation", None) != implementation:
            continue
        yield specimen(architecture, implementation, model)


def specimen(architecture: str, implementation: str, model: nn.Module | None = None) -> Specimen:
    """One specimen; `model` saves building one to see which batches it takes."""
    model = build(architecture, implementation) if model is None else model
    takes = inspect.signature(model.forward).parameters
    kinds = [Kind.PLAIN]
    if "attention_mask" in takes:
        kinds.append(Kind.PADDED)
    if "position_ids" in takes:
        kinds.append(Kind.PACKED)
    codebooks = getattr(model.config, "num_codebooks", 0) if architecture.startswith("musicgen") else 0

    def call(model: nn.Module, batch: Batch) -> Tensor:
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if "use_cache" in takes and (batch.kind is not Kind.PLAIN or architecture in UNCACHED):
            given["use_cache"] = False
        ids = batch.ids.repeat_interleave(codebooks, 0) if codebooks else batch.ids
        result = model(input_ids=ids, **given)
        logits = result.logits if hasattr(result, "logits") else result[0]
        return logits[::codebooks] if codebooks else logits

    return Specimen(
        name=architecture,
        implementation=implementation,
        build=lambda: build(architecture, implementation),
        call=call,
        kinds=tuple(kinds),
        dtype=_dtype(architecture, implementation),
    )


def build(architecture: str, implementation: str) -> nn.Module:
    """The model, small, with random weights that do not depend on the implementation."""
    config = shrunk_config(architecture, EXCEPTIONS.get(architecture, {}))
    torch.manual_seed(0)
    arguments = {"attn_implementation": implementation, "experts_implementation": "batched_mm"}
    if architecture in PARTS:
        kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])
        model = kind._from_config(getattr(config, PARTS[architecture]), attn_implementation=implementation)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, **arguments)
    return roughen(model, _dtype(architecture, implementation))


def _dtype(architecture: str, implementation: str) -> torch.dtype:
    """Float32 where it must be: eager attention hides keys by float64's lowest number and takes softmaxes in float32,
    where that number is -inf, and rows that see no key become NaN."""
    return torch.float32 if architecture in FLOAT32 or implementation == "eager" else torch.float64
