"""What PyTorch computes in one call for ``nn.TransformerEncoderLayer`` in evaluation, in operators of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_layer(
    input: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    linear1_weight: Tensor,
    linear1_bias: Tensor,
    linear2_weight: Tensor,
    linear2_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The operator ``aten::_transformer_encoder_layer_fwd``, of ``aten/src/ATen/native/transformers/transformer.cpp``.

    Args:
        input: ``[B, L, embed_dim]``, and so the result.
        embed_dim: channels.
        num_heads: heads.
        in_proj_weight: ``[3 embed_dim, embed_dim]``, queries, keys and values.
        in_proj_bias: its bias, as the others are.
        out_proj_weight: ``[embed_dim, embed_dim]``.
        out_proj_bias: see there.
        use_gelu: whether the activation is GELU, and not ReLU.
        norm_first: whether norms stand before attention and feed-forward layers, and not after the sums.
        eps: of the norms.
        norm1_weight: of the norm of the attention.
        norm1_bias: see there.
        norm2_weight: of the norm of the feed-forward layers.
        norm2_bias: see there.
        linear1_weight: ``[hidden, embed_dim]``.
        linear1_bias: see there.
        linear2_weight: ``[embed_dim, hidden]``.
        linear2_bias: see there.
        mask: True, or a number that is not 0, hides a key.
        mask_type: what the mask's dimensions are: 0 ``[L, L]``, 1 ``[B, L]``, 2 ``[B, num_heads, L, L]``.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(input, norm1_weight, norm1_bias) if norm_first else input
    mixed = F.linear(x, in_proj_weight, in_proj_bias)
    mixed = mixed.reshape(*mixed.shape[:2], 3, num_heads, embed_dim // num_heads)
    q, k, v = (part.transpose(1, 2) for part in mixed.unbind(2))  # [B, num_heads, L, D]
    visible = None
    if mask is not None:
        visible = torch.logical_not(mask) if mask.dtype == torch.bool else mask == 0
        visible = visible[:, None, None, :] if mask_type == 1 else visible
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    x = input + F.linear(attended.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    x = x if norm_first else norm(x, norm1_weight, norm1_bias)
    hidden = F.linear(norm(x, norm2_weight, norm2_bias) if norm_first else x, linear1_weight, linear1_bias)
    x = x + F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), linear2_weight, linear2_bias)
    return x if norm_first else norm(x, norm2_weight, norm2_bias)
