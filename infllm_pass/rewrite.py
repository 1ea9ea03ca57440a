"""Rewriting planned sites in place: to sparse operators, or to attention without a mask tensor.

A site on a CUDA device becomes the operator of the Triton kernels where these take it; every other site becomes the
torch operators, which run everywhere.

Invariants: the graph computes what it did (up to the method's own approximation on the sparse side); every
emitted node carries ``example_value`` and the source location of the site it replaces; a node is erased only
if the vocabulary knows it to be pure and nothing uses it any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graphs import fake_mode_of
from infllm_pass.guard import Branch
from infllm_pass.lowering.checks import refused_by_tiled
from infllm_pass.lowering.operators import attention_arguments, selection_arguments
from infllm_pass.masks import KeyCondition
from infllm_pass.plan import SitePlan
from infllm_pass.sites import AttentionSite
from infllm_pass.vocabulary import read

_GQA_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""On CUDA only the half-precision flash kernels take grouped heads; float32 would fall back to N x N scores."""


class Kernels(Enum):
    """What computes a site. The value is what the report calls it."""

    TRITON = "triton"
    TORCH = "torch operators"
    SDPA = "SDPA"


@dataclass(frozen=True)
class Outcome:
    """What became of a site.

    Attributes:
        mask_elided: whether its mask tensor, if it had one, is no longer read.
        kernels: what computes it.
        refusal: why the Triton kernels do not take a site on a GPU that is left to the torch operators; else "".
    """

    mask_elided: bool = False
    kernels: Kernels = Kernels.SDPA
    refusal: str = ""


class Rewriter:
    """Rewrites the sites of one graph.

    Args:
        graph: the graph.
        config: what sparse attention selects.
    """

    def __init__(self, graph: fx.Graph, config: SparseAttentionConfig) -> None:
        self.graph = graph
        self.config = config
        self._key_masks: dict[tuple[KeyCondition, ...], fx.Node] = {}

    def rewrite(self, plan: SitePlan, branch: Branch) -> Outcome:
        """Rewrite one site for one side of the length switch.

        Args:
            plan: the site's plan.
            branch: the side that this graph is compiled for.

        Returns:
            What became of it.
        """
        site = plan.site
        if not plan.switchable and not plan.maskless:
            return Outcome()
        outcome = Outcome(mask_elided=True)
        with self.graph.inserting_before(site.node):
            if plan.maskless and not (plan.switchable and branch is Branch.SPARSE):
                result = self._causal(plan)
            else:
                q, k, v = self._operands(site, site.query, site.key_heads, site.value_heads)
                examples = [node.meta["example_value"] for node in (q, v)]
                refusal = refused_by_tiled(*examples, float(plan.scale or 0.0), self.config.geometry)
                if refusal is None:
                    outcome = Outcome(True, Kernels.TRITON)
                    attend = self._tiled_attention
                else:
                    outcome = Outcome(True, Kernels.TORCH, refusal if examples[0].device.type != "cpu" else "")
                    attend = self._block_attention
                result = attend(plan, q, k, v, select=branch is Branch.SPARSE)
        site.node.replace_all_uses_with(result)
        _erase_unused(self.graph, site.node)
        return outcome

    def _causal(self, plan: SitePlan) -> fx.Node:
        site = plan.site
        example = site.node.meta["example_value"]
        grouped = example.device.type == "cpu" or example.dtype in _GQA_KERNEL_DTYPES
        key, value = (site.key_heads, site.value_heads) if grouped else (site.key, site.value)
        q, k, v = self._operands(site, site.query, key, value)
        heads = [node.meta["example_value"].shape[1] for node in (q, k, v)]
        return self._emit(
            site,
            F.scaled_dot_product_attention,
            q,
            k,
            v,
            is_causal=True,
            scale=plan.scale,
            enable_gqa=heads[0] != heads[1] or heads[0] != heads[2],
        )

    def _tiled_attention(self, plan: SitePlan, q: fx.Node, k: fx.Node, v: fx.Node, *, select: bool) -> fx.Node:
        """Selection and attention in one operator of Triton kernels; without `select` every row is dense."""
        from infllm_pass.lowering.tiled import tiled_arguments  # needs Triton, which CPU installations lack

        site, config = plan.site, self.config
        operands = [self._unit_stride(site, node) for node in (q, k, v)]
        results = self._emit(
            site,
            torch.ops.infllm.tiled_attention.default,
            *operands,
            self._key_mask(plan),
            *(None for _ in ("offsets", "cu_seqlens_q", "cu_seqlens_k", "offset", "window")),
            plan.scale,
            config.dense_len,
            select,
            *tiled_arguments(config.geometry),
        )
        return self._emit(site, operator.getitem, results, 0)

    def _block_attention(self, plan: SitePlan, q: fx.Node, k: fx.Node, v: fx.Node, *, select: bool) -> fx.Node:
        """Selection, if asked for, and attention as torch operators."""
        site, config = plan.site, self.config
        key_mask = self._key_mask(plan)
        nothing = (None for _ in ("offsets", "cu_seqlens_q", "cu_seqlens_k", "offset", "window"))
        call = (key_mask, *nothing, plan.scale, config.dense_len)
        blocks = None
        if select:
            select_blocks = torch.ops.infllm.select_blocks.default
            blocks = self._emit(site, select_blocks, q, k, *call, *selection_arguments(config.geometry))
        block_attention = torch.ops.infllm.block_attention.default
        results = self._emit(site, block_attention, q, k, v, blocks, *call, *attention_arguments(config.geometry))
        return self._emit(site, operator.getitem, results, 0)

    def _unit_stride(self, site: AttentionSite, node: fx.Node) -> fx.Node:
        """The tensor with its head dimension adjacent in memory, as the Triton kernels read it."""
        return node if node.meta["example_value"].stride(-1) == 1 else self._emit(site, "contiguous", node)

    def _operands(self, site: AttentionSite, *nodes: fx.Node) -> list[fx.Node]:
        """The site's tensors in the dtype it computes in, which autocast may have made another than theirs."""
        dtype = site.node.meta["example_value"].dtype
        return [
            node if node.meta["example_value"].dtype == dtype else self._emit(site, "to", node, dtype) for node in nodes
        ]

    def _key_mask(self, plan: SitePlan) -> fx.Node | None:
        """The keys' validity as a node ``[B, Lk]`` of dtype bool, made once for all sites that share it."""
        conditions = plan.mask.key_conditions if plan.mask is not None else ()
        if not conditions:
            return None
        if conditions not in self._key_masks:
            site = plan.site
            mask: fx.Node | None = None
            for condition in conditions:
                test = self._emit(site, condition.relation, condition.source, condition.constant)
                mask = test if mask is None else self._emit(site, "logical_and", mask, test)
            batch = self._emit(site, "size", site.key, 0)
            self._key_masks[conditions] = self._emit(site, "expand", mask, batch, -1)
        return self._key_masks[conditions]

    def _emit(self, site: AttentionSite, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, a method for a name, with the metadata that later passes rely on."""
        insert = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = insert(target, args, kwargs)  # type: ignore[arg-type]
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in site.node.meta:
                node.meta[key] = site.node.meta[key]
        values = [arg.meta["example_value"] if isinstance(arg, fx.Node) else arg for arg in args]
        with fake_mode_of(site.query) or nullcontext(), torch.no_grad():
            if isinstance(target, str):
                node.meta["example_value"] = getattr(values[0], target)(*values[1:], **kwargs)
            else:
                node.meta["example_value"] = target(*values, **kwargs)
        return node


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without users and, after it, those of its inputs that only it used.

    Only kinds of the vocabulary are erased: they are pure, which ``Graph.eliminate_dead_code`` wrongly
    assumes of in-place tensor methods as well.
    """
    pending = [node]
    while pending:
        candidate = pending.pop()
        if candidate.users or candidate._erased or read(candidate) is None:
            continue
        inputs = candidate.all_input_nodes
        graph.erase_node(candidate)
        pending.extend(inputs)
