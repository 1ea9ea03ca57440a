"""What was decided about a site: its plan, and what it becomes on either side of the length switch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import sympy
import torch

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graph.facts import same, size
from infllm_pass.kernels.geometry import ChannelSets
from infllm_pass.masks import MaskPredicate
from infllm_pass.plan.length_guard import Branch
from infllm_pass.reasons import Reason
from infllm_pass.sites import AttentionSite, PartialSite


class Lowering(Enum):
    """What a site becomes on one side of the length switch."""

    UNCHANGED = "it stays as the model wrote it"
    CAUSAL = "causal attention that reads no mask tensor"
    DENSE = "attention of every key that the mask lets through, the mask as vectors and numbers"
    SPARSE = "attention of selected key blocks, the mask as vectors and numbers"


@dataclass(frozen=True)
class SitePlan:
    """What was found out about a site and what is to be done with it.

    Attributes:
        site: the site.
        reason: why it is switchable, or why not.
        detail: what was seen at this site, for people; "" when the reason says it all.
        mask: what the mask lets through, if that was proved causal.
        scale: softmax scale as a number; None until it is known.
        config: what sparse attention selects here, and from which length on; None for a site that was refused before.
        dense_len_origin: where a ``dense_len`` that the device decides comes from; "" where it was given.
        mask_inputs: names of the inputs that the mask is read from by value; none if the graph proves it.
        mask_origin: these and why they are inputs, for people; "" where there are none.
        channels: channels of the heads that token scores read; None: they are not used.
        scores: how blocks are scored, for people; "" for a site that stays dense.
        error: what the pass itself failed with; None: it did not.
    """

    site: AttentionSite | PartialSite
    reason: Reason
    detail: str = ""
    mask: MaskPredicate | None = None
    scale: float | None = None
    config: SparseAttentionConfig | None = None
    dense_len_origin: str = ""
    mask_inputs: tuple[str, ...] = ()
    mask_origin: str = ""
    channels: ChannelSets | None = None
    scores: str = ""
    error: Exception | None = field(default=None, compare=False, repr=False)

    @property
    def switchable(self) -> bool:
        """Whether the site becomes dense/sparse switchable attention."""
        return self.reason is Reason.SWITCHABLE

    def lowering(self, branch: Branch) -> Lowering:
        """What the site becomes on one side of the length switch."""
        if self.switchable and branch is Branch.SPARSE:
            return Lowering.SPARSE
        if self.causal:
            return Lowering.CAUSAL
        if self.switchable or self.reason is Reason.WINDOW_WITHIN_BUDGET:
            return Lowering.DENSE
        return Lowering.UNCHANGED

    @property
    def causal(self) -> bool:
        """Whether the site, when it stays dense, is plain causal attention, which needs no mask tensor."""
        if self.mask is None or not self.mask.plain or isinstance(self.site, PartialSite) or self.terms:
            return False
        if self.flagged:
            return True
        length_q, length_k = lengths_of(self.site)
        return not self.in_cache and (length_q == 1 or same(length_q, length_k))

    @property
    def terms(self) -> tuple[str, ...]:
        """What the scores have beside the mask, by the names of the operators' arguments."""
        if isinstance(self.site, PartialSite):
            return ()
        found = {
            "key_bias": self.mask is not None and bool(self.mask.key_terms.bias),
            "sinks": self.site.sinks is not None,
            "softcap": self.site.softcap != 0.0,
        }
        return tuple(name for name, present in found.items() if present)

    @property
    def flagged(self) -> bool:
        """Whether the causal flag of the call is all that limits the keys, whatever their number."""
        return isinstance(self.site, AttentionSite) and self.site.is_causal is True and not self.site.masks

    @property
    def in_cache(self) -> bool:
        """Whether the queries are not the last of the keys: these are a cache with room for more."""
        if self.mask is None or self.mask.causal_offset is None or isinstance(self.site, PartialSite):
            return False
        length_q, length_k = lengths_of(self.site)
        return not same(self.mask.causal_offset, length_k - length_q)

    @property
    def length(self) -> int | torch.SymInt | None:
        """Keys of a row, padding included, once the queries' own are appended; None: only the device knows it."""
        if self.mask is None or isinstance(self.site, PartialSite):
            return None
        if not self.in_cache:
            return self.site.shape(self.site.key)[2]
        offset: sympy.Expr = self.mask.causal_offset
        return self.site.shape(self.site.query)[2] + int(offset) if offset.is_Integer else None

    @property
    def mask_verdict(self) -> str:
        """What the mask was found to be, in a few words."""
        if self.mask is not None and isinstance(self.site, AttentionSite):
            softcap = f"scores capped at {self.site.softcap:g}" if self.site.softcap else ""
            return ", ".join(filter(None, (str(self.mask), softcap, "sinks" if self.site.sinks else "")))
        if self.reason is Reason.BIDIRECTIONAL:
            return "not causal" if isinstance(self.site, AttentionSite) and self.site.masks else "none"
        return "not analysed" if self.reason not in (Reason.UNPROVEN_MASK, Reason.ADDITIVE_BIAS) else "unknown"


def lengths_of(site: AttentionSite) -> tuple[sympy.Expr, sympy.Expr]:
    """The numbers of queries and keys."""
    return size(site.shape(site.query)[2]), size(site.shape(site.key)[2])
