"""Models of PyPI packages that define transformers of their own: torchtune, litgpt and x-transformers.

They are extras of the tests, pinned in ``requirements-zoo.txt``; an absent package is an architecture that cannot be
built, and says so.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import LONGEST, VOCABULARY, WINDOW
from .specimens import Batch, CannotBuildError, Specimen, roughen

_WIDTH, _HEADS, _KV_HEADS, _LAYERS = 64, 4, 2, 2

_TORCHTUNE = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "llama2": "llama2",
    "llama3": "llama3",
    "llama3_1": "llama3_1",
    "llama3_2": "llama3_2",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
}
_TORCHTUNE_SIZES = {
    "vocab_size": VOCABULARY,
    "num_layers": _LAYERS,
    "num_heads": _HEADS,
    "num_kv_heads": _KV_HEADS,
    "head_dim": _WIDTH // _HEADS,
    "embed_dim": _WIDTH,
    "intermediate_dim": 96,
    "max_seq_len": LONGEST,
    "sliding_window_size": WINDOW,
}
_LITGPT = ("pythia-14m", "Llama-3.2-1B", "Mistral-7B-v0.1", "Gemma-2-2b", "phi-2", "Mixtral-8x7B-v0.1", "Qwen3-0.6B")
_X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "absolute positions": {},
    "alibi": {"alibi_pos_bias": True},
    "fused": {"attn_flash": True, "rotary_pos_emb": True},
    "grouped heads": {"attn_kv_heads": _KV_HEADS, "rotary_pos_emb": True},
    "grouped heads, fused": {"attn_kv_heads": _KV_HEADS, "attn_flash": True, "rotary_pos_emb": True},
    "memory keys": {"attn_num_mem_kv": 4},
    "normalised queries and keys": {"attn_qk_norm": True},
    "relative position bias": {"rel_pos_bias": True},
    "soft-clamped scores": {"attn_softclamp_logits": True},
    "talking heads": {"attn_pre_talking_heads": True},
    "zero key": {"attn_add_zero_kv": True},
}


def architectures() -> list[str]:
    """Names of the form ``package model``."""
    names = [f"torchtune {name}" for name in _TORCHTUNE]
    names += [f"litgpt {name}" for name in _LITGPT]
    names += [f"x-transformers {name}" for name in _X_TRANSFORMERS]
    return sorted(names)


def specimens(architecture: str) -> Iterator[Specimen]:
    """One specimen; the packages choose how attention is computed.

    Raises:
        CannotBuildError: the package is not installed, or does not build the model.
    """
    yield specimen(architecture, "own")


def specimen(architecture: str, implementation: str) -> Specimen:
    """One specimen, built once to see that it can be."""
    package, _, name = architecture.partition(" ")
    make: Callable[[], nn.Module] = partial(_BUILDERS[package], name)
    try:
        make()
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    return Specimen(architecture, implementation, lambda: roughen(make(), torch.float64), _call)


def _call(model: nn.Module, batch: Batch) -> Tensor:
    result = model(batch.ids)
    return result if isinstance(result, Tensor) else torch.cat(list(result), 1)


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise CannotBuildError(f"{package} does not import ({error}): pip install -r requirements-zoo.txt") from error


def _torchtune(name: str) -> nn.Module:
    make = getattr(_load(f"torchtune.models.{_TORCHTUNE[name]}._component_builders"), name)
    takes = inspect.signature(make).parameters
    torch.manual_seed(0)
    return make(**{size: value for size, value in _TORCHTUNE_SIZES.items() if size in takes})


def _litgpt(name: str) -> nn.Module:
    package = _load("litgpt")
    published = package.Config.from_name(name)
    sizes = {"n_layer": _LAYERS, "n_embd": _WIDTH, "n_head": _HEADS, "head_size": _WIDTH // _HEADS}
    sizes["n_query_groups"] = _HEADS if published.n_query_groups == published.n_head else _KV_HEADS
    sizes |= {"intermediate_size": 96, "block_size": LONGEST, "padded_vocab_size": VOCABULARY}
    torch.manual_seed(0)
    return package.GPT(package.Config.from_name(name, **sizes))


def _x_transformers(name: str) -> nn.Module:
    package = _load("x_transformers")
    torch.manual_seed(0)
    layers = package.Decoder(dim=_WIDTH, depth=_LAYERS, heads=_HEADS, attn_dim_head=16, **_X_TRANSFORMERS[name])
    return package.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LONGEST, attn_layers=layers)


_BUILDERS = {"torchtune": _torchtune, "litgpt": _litgpt, "x-transformers": _x_transformers}
