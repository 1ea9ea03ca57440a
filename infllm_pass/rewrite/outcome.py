"""The result of rewriting one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class CacheUse(Enum):
    """What becomes of a cache's compressed keys. The value is what the report calls it."""

    NONE = ""
    CARRIED = "carried"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True)
class Outcome:
    """What became of a site.

    Attributes:
        mask_elided: whether the compiled graph no longer reads a mask tensor here (or never had one).
        kernels: what computes the site on this side: "triton", "C++" (torch operators where a warning has said that it
            cannot be compiled), "torch operators", "SDPA", or what another target calls it.
        refusal: why the Triton kernels do not take a site on a GPU that "torch operators" compute; else "".
        cache_state: whether the compressed keys of a cache are "carried" from call to call or "recomputed" at each; ""
            where there is no cache.
        cache_detail: why they are recomputed; else "".
        target: name of the target that the site was rewritten to; "" for one that stays as it was.
        refusals: for each target that was asked before and refused, its name and why. Not in the table.
    """

    mask_elided: bool = False
    kernels: str = "SDPA"
    refusal: str = ""
    cache_state: str = CacheUse.NONE.value
    cache_detail: str = ""
    target: str = ""
    refusals: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def rewritten(self) -> bool:
        """Whether the site was changed at all."""
        return self.target != ""
