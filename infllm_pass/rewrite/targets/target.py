"""What a lowering target is: something that a site can become, and says which sites it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from infllm_pass.config import PUBLISHED, SparseAttentionConfig
from infllm_pass.kernels.cpu import native
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kv_cache.spec import StateLayout
from infllm_pass.lowering.ops.checks import refused_by_tiled
from infllm_pass.plan.site_plan import Lowering, SitePlan
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.sites import AttentionSite


@dataclass(frozen=True)
class Request:
    """A site that is to be computed, and how.

    Attributes:
        site: the site.
        plan: what was found out about it; the mask is proved.
        lowering: what is to be computed, see `Lowering`; never UNCHANGED.
    """

    site: AttentionSite
    plan: SitePlan
    lowering: Lowering

    @property
    def config(self) -> SparseAttentionConfig:
        """What the site is configured with; as published for one that is not asked to be sparse."""
        return self.plan.config or SparseAttentionConfig.from_dict(PUBLISHED)

    @property
    def geometry(self) -> BlockGeometry:
        """What the site's kernels are told of the selection."""
        if self.plan.config is None:
            return self.config.geometry
        head_dim = int(self.site.shape(self.site.key_heads)[3])
        return self.config.geometry_for(head_dim, self.plan.channels)

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return float(self.plan.scale or 0.0)


@dataclass(frozen=True)
class Refusal:
    """Why a target does not take a site.

    Attributes:
        detail: in words that say what to change.
        reason: why the site stays dense if every target refuses it for a reason; None: nothing that a model can change.
    """

    detail: str
    reason: Reason | None = None


@dataclass(frozen=True)
class Kernels:
    """What computes a site.

    Attributes:
        name: what the report calls it.
        refusal: why a site on a GPU is left to operators that are tuned for the CPU; else "".
    """

    name: str
    refusal: str = ""


class Target(Protocol):
    """Something that a site can become."""

    @property
    def name(self) -> str:
        """What the report calls it, among the targets of one model its own."""
        ...

    def accepts(self, request: Request) -> Refusal | None:
        """Why a site cannot become this; None if it can. Asked before any length is compared: adds no guards."""
        ...

    def state(self, request: Request) -> StateLayout | None:
        """What it keeps of a cache from call to call; None: nothing.

        With a layout it takes only sites that decode from a cache whose state can be kept.
        """
        ...

    def kernels(self, request: Request) -> Kernels:
        """What computes an accepted site."""
        ...

    def emit(self, request: Request, builder: SiteBuilder) -> fx.Node:
        """Insert the calls that compute an accepted site.

        Args:
            request: the site.
            builder: inserts calls in its place, and makes their operands.

        Returns:
            The output, ``[B, Hq, Lq, Dv]``; a differing dtype and the model's layout are restored by the caller.
        """
        ...


def operator_kernels(request: Request) -> Kernels:
    """What computes a site in this package's operators: the Triton kernels where they take it."""
    site = request.site
    query = site.query.example.to(site.dtype)  # autocast may have made it another than the tensor's
    refusal = refused_by_tiled(query, site.value_heads.example, request.scale, request.geometry)
    if refusal is None:
        return Kernels("triton")
    name = "C++" if native.takes(query) else "torch operators"
    return Kernels(name, refusal if query.device.type != "cpu" else "")


def refuses_terms(request: Request) -> Refusal | None:
    """The refusal of numbers added to keys that differ among the query heads of a group; None for all other sites."""
    plan, site = request.plan, request.site
    heads, kv_heads = int(site.query_heads), int(site.kv_heads)
    biases = () if plan.mask is None else plan.mask.key_terms.bias
    apart = next((bias for bias in biases if not bias.is_shared_by(heads, kv_heads)), None)
    if apart is None:
        return None
    seen = f"{apart.described}; it differs among the {heads // kv_heads} query heads of a key/value head"
    return Refusal(seen, Reason.ADDITIVE_BIAS)
