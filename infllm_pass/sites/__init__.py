"""Finding attention sites in a graph, however the attention is written, and reading what each computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from infllm_pass.graph.decompose import COMPOSITES, UNTRACED
from infllm_pass.graph.facts import GraphFacts
from infllm_pass.graph.op_table import read
from infllm_pass.reasons import Reason
from infllm_pass.sites.flex import read_flex
from infllm_pass.sites.fused import read_fused
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.site import AttentionSite, Operand, PartialSite, Step
from infllm_pass.sites.softmax import read_handwritten


def read_composite(layouts: Layouts, node: fx.Node) -> PartialSite | None:
    """A call that holds a whole attention inside; what can be spelled out was so before sites are looked for."""
    call = read(node)
    if call is None or call.kind not in COMPOSITES:
        return None
    why = node.meta.get(UNTRACED, "its results are not read one by one")
    name = getattr(node.target, "__name__", node.name)
    return PartialSite(node, Reason.PARTIAL_MATCH, node, f"{name}, not spelled out: {why}")


_READERS = (read_fused, read_flex, read_handwritten, read_composite)


def find_sites(facts: GraphFacts, layouts: Layouts | None = None) -> Iterator[AttentionSite | PartialSite]:
    """Every attention of a graph, in order: those that were read to the end, and those that were not.

    A failure of a reader is a site of its own, and no exception.

    Args:
        facts: the graph's facts.
        layouts: its layout operators, for whoever asks for more of them; None: made here.
    """
    layouts = Layouts(facts) if layouts is None else layouts
    seen: Counter[str] = Counter()
    for node in facts.graph.nodes:
        for reader in _READERS:
            try:
                site = reader(layouts, node)
            except Exception as error:
                yield PartialSite(node, Reason.INTERNAL, node, f"{type(error).__name__}: {error}", error)
                break
            if site is not None:
                path = site.module_path
                yield replace(site, order=seen[path]) if isinstance(site, AttentionSite) else site
                seen[path] += 1
                break


__all__ = ["AttentionSite", "Operand", "PartialSite", "Step", "find_sites"]
