"""More positions for a model with a rotary embedding, by the kinds of scaling that transformers has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from infllm_pass.errors import AdaptationError, ConfigError, MissingDependencyError

KINDS = ("yarn", "longrope", "linear", "dynamic")
"""YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), interpolated positions (arXiv 2306.15595), and a base that
grows with the text (dynamic NTK)."""

LOCAL = ("sliding", "chunked")
"""Layer types that attend within a window: the distances they see do not grow with the text."""


def extend_positions(config: Any, length: int, kind: str = "yarn", parameters: Mapping[str, Any] | None = None) -> Any:
    """A model's configuration with more positions, for training that adapts the model to them.

    The result is the argument of ``from_pretrained(folder, config=...)``; what is saved afterwards carries it. The
    factor is `length` over the positions that the model has. Of layer types with rotary parameters of their own, those
    that attend within a window keep theirs.

    - ``yarn``: high frequencies stay, low ones are interpolated; the same for every text.
    - ``longrope``: one factor for each frequency, used where a call has more positions than the model had before, else
      ``short_factor``. The factors are the result of a search; without any the long ones are YaRN's, where the search
      begins, and the short ones 1.
    - ``linear``: all frequencies are interpolated.
    - ``dynamic``: the base grows with the longest text of a call. transformers scales from
      ``max_position_embeddings``, which therefore keeps its value here and is `length` for all other kinds.

    Args:
        config: the configuration of a model of transformers; it is not changed.
        length: how many positions the model is to have.
        kind: one of `KINDS`.
        parameters: further fields of transformers' ``rope_parameters``, such as ``beta_fast``, ``attention_factor``,
            ``long_factor`` and ``short_factor``.

    Returns:
        A copy of the configuration.

    Raises:
        AdaptationError: the model has no rotary embedding, or one that is scaled already.
        ConfigError: an unknown kind, or `length` is not more than the model has.
        MissingDependencyError: transformers is not installed.
    """
    if kind not in KINDS:
        raise ConfigError("kind", kind, f"one of {', '.join(KINDS)}")
    extended = copy.deepcopy(config)
    text = extended.get_text_config() if callable(getattr(extended, "get_text_config", None)) else extended
    known = getattr(text, "rope_parameters", None)
    positions = getattr(text, "max_position_embeddings", None)
    if not known or not isinstance(positions, int) or getattr(text, "alibi", False):
        raise AdaptationError(
            f"{type(config).__name__} describes no rotary embedding (rope_parameters={known!r}): its positions cannot "
            "be extended"
        )
    if length <= positions:
        raise ConfigError("length", length, f"more than the model's {positions} positions")
    for layer_type, old in _by_layer_type(known).items():
        if old.get("rope_type", "default") != "default":
            raise AdaptationError(
                f"the model's rotary embedding is scaled already ({old['rope_type']!r}): extend the configuration that "
                "it was scaled from"
            )
        kept = {name: value for name, value in old.items() if name != "rope_type"}
        new = {**kept, "rope_type": kind, "factor": length / positions}
        if kind in ("yarn", "longrope"):
            new["original_max_position_embeddings"] = positions
        if kind == "longrope":
            interpolated = _factors_of_yarn(text, {**new, "rope_type": "yarn"}, layer_type)
            new |= {"long_factor": interpolated, "short_factor": [1.0] * len(interpolated)}
        old.clear()
        old.update({**new, **(parameters or {})})
    if kind != "dynamic":
        text.max_position_embeddings = length
    if hasattr(text, "original_max_position_embeddings"):  # Phi-3 and its kin keep a second one, which comes first
        text.original_max_position_embeddings = positions
    return extended


def _by_layer_type(known: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters that are to change, by the type of layer; None: one set for all layers."""
    nested = {name: value for name, value in known.items() if isinstance(value, dict)}
    if not nested:
        return {None: known}
    return {name: value for name, value in nested.items() if not name.startswith(LOCAL)}


def _factors_of_yarn(text: Any, parameters: dict[str, Any], layer_type: str | None) -> list[float]:
    """What YaRN divides each frequency by."""
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError:
        raise MissingDependencyError("transformers", "hf", "extending positions") from None
    other = copy.deepcopy(text)
    if layer_type is None:
        other.rope_parameters = parameters
    else:
        other.rope_parameters[layer_type] = parameters
    scaled, _ = ROPE_INIT_FUNCTIONS["yarn"](other, torch.device("cpu"), layer_type=layer_type)
    plain = parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return [round(float(factor), 6) for factor in plain / scaled]
