"""What a site can become: one file a target, and the order in which they are asked.

A target is asked whether it accepts a request, and the first one that does computes the site. The order goes from the
cheapest to the most general: PyTorch's own attention for what is plain causal attention, the decode operator for few
queries over a cache whose state can be kept, the block-sparse operators for the rest.
"""

from infllm_pass.rewrite.targets.block_sparse import BlockSparse
from infllm_pass.rewrite.targets.decode import Decode, ScorerState
from infllm_pass.rewrite.targets.sdpa import CausalSdpa
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request, Target

DEFAULT_TARGETS: tuple[Target, ...] = (CausalSdpa(), Decode(), BlockSparse())

__all__ = [
    "DEFAULT_TARGETS",
    "BlockSparse",
    "CausalSdpa",
    "Decode",
    "Kernels",
    "Refusal",
    "Request",
    "ScorerState",
    "SiteBuilder",
    "Target",
]
