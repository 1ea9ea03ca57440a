"""Matcher for ``scaled_dot_product_attention`` in every argument form."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graph.op_table import Call, Kind, read
from infllm_pass.masks.normal_form import MaskRole, MaskTerm
from infllm_pass.reasons import Reason
from infllm_pass.sites.assembly import NoAttention, NoSinks, Overwrite, OwnQueries, Reads, assemble
from infllm_pass.sites.index_algebra import FEATURE, KEY
from infllm_pass.sites.layout_ops import LayoutError, out_axis
from infllm_pass.sites.layouts import Index, Layouts, Reading
from infllm_pass.sites.site import AttentionSite, PartialSite


def read_fused(layouts: Layouts, node: fx.Node) -> AttentionSite | PartialSite | None:
    """Read a node as a call of fused attention; None for one that is none."""
    call = read(node)
    if call is None or call.kind is not Kind.ATTENTION:
        return None
    args = call.args
    if not layouts.is_tensor(node) or not all(layouts.is_tensor(args.get(name)) for name in ("query", "key", "value")):
        return None
    mask = args.get("attn_mask")
    if mask is not None and not layouts.is_tensor(mask):
        return PartialSite(node, Reason.UNPROVEN_MASK, node, f"the mask is {mask!r}")
    dtype = layouts.facts.example(node).dtype
    terms = () if mask is None else (_mask_term(layouts, node, mask),)
    reads = fused_reads(layouts, node, call, terms=terms, scale=args.get("scale"), dtype=dtype)
    if reads is None or None in terms:
        return PartialSite(node, Reason.SHAPES, node, _shapes(layouts, args))
    return site_of(layouts, reads, Reason.SHAPES, _shapes(layouts, args))


def site_of(
    layouts: Layouts, reads: Reads, otherwise: Reason | None, reached: str
) -> AttentionSite | PartialSite | None:
    """The site that reads make, or how far reading them came.

    Args:
        layouts: the graph's layout operators.
        reads: how the attention reads its tensors.
        otherwise: the reason where their dimensions are not those of any attention; None: then it is none.
        reached: how far the matcher had come.
    """
    try:
        return assemble(layouts, reads)
    except OwnQueries:
        return PartialSite(reads.node, Reason.CROSS_ATTENTION, reads.query.node, reached)
    except LayoutError:
        return PartialSite(reads.node, otherwise or Reason.LAYOUT, reads.node, reached)
    except NoAttention:
        return None if otherwise is None else PartialSite(reads.node, otherwise, reads.node, reached)
    except Overwrite as overwrite:
        return PartialSite(reads.node, Reason.OVERWRITTEN, overwrite.node, reached)
    except NoSinks as more:
        return PartialSite(reads.node, Reason.SINK, more.node, f"{reached}; its sinks differ by more than the head")


def fused_reads(
    layouts: Layouts, node: fx.Node, call: Call, *, terms: tuple[MaskTerm | None, ...], scale: Any, dtype: torch.dtype
) -> Reads | None:
    """How a fused call ``[..., H, Lq, D]`` reads its tensors; None for ranks and sizes it cannot have."""
    args = call.args
    query, key, value = (args[name] for name in ("query", "key", "value"))
    shape = layouts.shape(node)
    rank = len(shape)
    if rank < 2:
        return None
    places = tuple(out_axis(dim) for dim in range(rank))
    indices: list[Index] = []
    for tensor, matrix in ((query, (places[-2], FEATURE)), (key, (KEY, FEATURE)), (value, (KEY, places[-1]))):
        own = layouts.shape(tensor)
        if len(own) > rank or len(own) < 2:
            return None
        outer = list(layouts.broadcast(tensor, (*places[:-2], *matrix), (*shape[:-2], *own[-2:])) or ())[:-2]
        if args.get("enable_gqa") and len(own) >= 3 and own[-3] not in (1, shape[-3]):
            outer[-1] = sympy.floor(places[-3] * own[-3] / shape[-3])
        indices.append((*outer, *matrix))
    return Reads(
        node=node,
        query=Reading(query, indices[0]),
        key=Reading(key, indices[1]),
        value=Reading(value, indices[2]),
        terms=tuple(term for term in terms if term is not None),
        scale=float(scale) if isinstance(scale, (int, float)) else scale,
        dtypes=(dtype, dtype),
        first=node,
        last=node,
        is_causal=args.get("is_causal", False),
        dropout_p=args.get("dropout_p", 0.0),
        length=places[-2],
    )


def _mask_term(layouts: Layouts, node: fx.Node, mask: fx.Node) -> MaskTerm | None:
    shape = layouts.shape(node)
    places = tuple(out_axis(dim) for dim in range(len(shape) - 1))
    own = layouts.shape(mask)
    if len(own) > len(shape):
        return None
    wanted = (*places, KEY)[len(shape) - len(own) :]
    index = tuple(sympy.Integer(0) if extent == 1 else place for extent, place in zip(own, wanted, strict=True))
    role = MaskRole.KEEP if layouts.facts.example(mask).dtype == torch.bool else MaskRole.ADDED
    return MaskTerm(mask, role, index)


def _shapes(layouts: Layouts, args: dict[str, Any]) -> str:
    described = (str(list(layouts.facts.example(args[name]).shape)) for name in ("query", "key", "value"))
    return "shapes are " + ", ".join(described)
