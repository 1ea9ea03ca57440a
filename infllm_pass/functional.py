"""Switchable attention as a function, for models that call it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.guard import Branch, decide_length
from infllm_pass.lowering import operators
from infllm_pass.lowering.checks import check_attention


def switchable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    *,
    key_mask: Tensor | None = None,
    offset: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention that is dense for short sequences and block-sparse for long ones.

    InfLLM-V2, arXiv 2509.24663, section 3. Differentiable in q, k and v; no gradient flows through the
    selection of blocks. Each row of a padded batch takes its own side of the switch.

    Args:
        q: queries after position encoding, ``[B, Hq, Lq, D]``; float32, bfloat16, float16 or float64.
        k: keys, ``[B, Hkv, Lk, D]``, ``Hq % Hkv == 0``, D at most 256.
        v: values, ``[B, Hkv, Lk, Dv]``.
        config: a `SparseAttentionConfig`, a dict of its fields, or None for the defaults.
        key_mask: bool ``[B, Lk]``, True where a key is valid; a row's sequence runs from its first to its last
            valid key.
        offset: key index of the first query; None: the queries are the last of the keys.
        scale: softmax scale; None: ``D ** -0.5``.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError: before anything is computed.
    """
    chosen = SparseAttentionConfig.coerce(config)
    check_attention(q, k, v, None, key_mask)
    factor = float(q.shape[3]) ** -0.5 if scale is None else scale
    blocks = None
    if decide_length(k.shape[2], chosen.dense_len).branch is Branch.SPARSE:
        blocks = operators.select_blocks(
            q,
            k,
            key_mask,
            offset,
            factor,
            chosen.dense_len,
            *operators.selection_arguments(chosen.geometry),
        )
    out: Tensor = operators.block_attention(
        q,
        k,
        v,
        blocks,
        key_mask,
        offset,
        factor,
        chosen.dense_len,
        *operators.attention_arguments(chosen.geometry),
    )[0]
    return out
