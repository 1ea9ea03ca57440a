"""The report: one row for each attention site of each compiled graph, as a table or as data."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graph.facts import example_of
from infllm_pass.plan.length_guard import Branch, LengthGuard
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.reasons import Reason, Uncompiled
from infllm_pass.rewrite.outcome import Outcome
from infllm_pass.sites import AttentionSite, PartialSite
from infllm_pass.tables import Column, FittedTable, csv_text, rendered


@dataclass(frozen=True)
class SiteFacts:
    """What a site is, and where it stands.

    Attributes:
        graph: number of the compiled graph, counted from 0.
        site: number of the site in its graph.
        module: dotted path of the module it was traced in, "" outside any.
        source: ``file:line`` of the call, "" if unknown.
        query_shape: ``[B, Hq, Lq, D]``; dynamic sizes as Dynamo's symbols.
        key_shape: ``[B, Hkv, Lk, D]`` before heads were repeated.
        dtype: the dtype that attention is computed in.
        device: the device.
        group: query heads for one key/value head; 0 where the heads do not divide.
    """

    graph: int
    site: int
    module: str
    source: str
    query_shape: tuple[int | str, ...]
    key_shape: tuple[int | str, ...]
    dtype: str
    device: str
    group: int


@dataclass(frozen=True)
class SiteDecision:
    """What was found out about a site, and decided.

    Attributes:
        mask: what the mask was found to be.
        decision: "switchable" or "dense".
        branch: the side of the switch that this graph runs, "dense" or "sparse".
        guard: the length test that chose the side; "" for a dense site.
        guard_dynamic: whether Dynamo checks the test at every call; False: the length is static.
        reason: name of the `Reason`.
        explanation: why, and what would change it.
        config: the fields of the site's configuration that differ from the model's, and their values here.
        dense_len_origin: where a ``dense_len`` that the device decides comes from; "" where it was given. Not in the
            table.
        mask_origin: which inputs the mask is read from by value, and why they are inputs; "" if the graph proves it.
        scores: how blocks are scored, and by which channels; "" for a dense site.
        channels: all channels that token scores read, a set for all key/value heads or one for each. Not in the table.
        traceback: where the pass itself failed at this site, as Python prints it; else "". Not in the table.
        reproducer: the script that makes this failure happen again, or why none was written; "" if none was asked for.
    """

    mask: str
    decision: str
    branch: str
    guard: str
    guard_dynamic: bool
    reason: str
    explanation: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dense_len_origin: str = ""
    mask_origin: str = ""
    scores: str = ""
    channels: tuple[tuple[int, ...], ...] = ()
    traceback: str = ""
    reproducer: str = ""


@dataclass(frozen=True, kw_only=True)
class SiteReport(Outcome, SiteDecision, SiteFacts):
    """One attention site of one compiled graph: its attributes are those of the three parts."""

    @classmethod
    def of(cls, facts: SiteFacts, decision: SiteDecision, outcome: Outcome) -> SiteReport:
        """The report of a site, put together."""
        return cls(**vars(facts), **vars(decision), **vars(outcome))


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its number, the sides of the switch its sites run, and its sites.

    Attributes:
        graph: the number.
        sites: the sites.
        seconds: what the stages of the pass took, and the compiler behind it once that is done; see `stages.Stage`.
    """

    graph: int
    sites: tuple[SiteReport, ...]
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def branches(self) -> tuple[str, ...]:
        """The distinct sides of the switch that the graph's switchable sites run."""
        return tuple(sorted({site.branch for site in self.sites if site.decision == "switchable"}))


@dataclass
class Report:
    """All graphs compiled so far for one model.

    ``print(report)`` shows a table as wide as the terminal (without one: the environment's COLUMNS, or 120), or a block
    for each site where a table does not fit; `to_dict`, `to_json` and `to_csv` give the same as data.

    Attributes:
        graphs: the graphs.
        uncompiled_calls: how many calls ran the plain model, dense, by the name of the reason; see `Uncompiled`.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    uncompiled_calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def sites(self) -> list[SiteReport]:
        """The sites of all graphs, in order of compilation."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def switchable(self) -> int:
        """How many sites, over all graphs, are switchable."""
        return sum(site.decision == "switchable" for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "graphs": [
                {
                    "graph": graph.graph,
                    "branches": list(graph.branches),
                    "sites": [asdict(s) for s in graph.sites],
                    "seconds": dict(graph.seconds),
                }
                for graph in self.graphs
            ],
            "uncompiled_calls": dict(self.uncompiled_calls),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_rows(self) -> list[dict[str, Any]]:
        """The report as plain data, a flat row for each site."""
        return [asdict(site) for site in self.sites]

    def to_csv(self) -> str:
        """The report as CSV, a line for each site."""
        return csv_text(self.to_rows())

    def __rich__(self) -> FittedTable | str:
        if not self.sites:
            return self._title()
        return FittedTable(_COLUMNS, [_cells(rows) for rows in _runs_of_equal_sites(self.sites)], self._title())

    def _title(self) -> str:
        calls = "; ".join(
            f"{count} call(s) ran the plain model, dense: {name}: {Uncompiled[name].value}"
            for name, count in self.uncompiled_calls.items()
        )
        if not self.graphs:
            return calls or "no graph compiled yet: call the model first"
        counts = f"{len(self.graphs)} graph(s), {len(self.sites)} attention site(s), {self.switchable} switchable"
        return "; ".join(filter(None, (counts, calls)))

    def __str__(self) -> str:
        return rendered(self)


_PLACE = ("site", "module")
_FOLDED = ("module", "mask", "scores", "cache state", "config", "why")
_COLUMNS = tuple(
    Column(name, name, folds=name in _FOLDED, right=False, drop_empty=True)
    for name in (
        "graph",
        *_PLACE,
        "q [B,H,L,D]",
        "kv heads",
        "mask",
        "decision",
        "runs",
        "scores",
        "kernels",
        "cache state",
        "config",
        "guard",
        "why",
    )
)


def _cells(rows: list[SiteReport]) -> dict[str, str]:
    """The table's line for neighbouring sites that show the same but for their place."""
    first, last = rows[0], rows[-1]
    places = [site.module or site.source for site in (first, last)]
    return {
        "graph": str(first.graph),
        "site": str(first.site) if first is last else f"{first.site}-{last.site}",
        "module": places[0] if first is last else f"{places[0]} … {places[1]}",
        "q [B,H,L,D]": ", ".join(map(str, first.query_shape)),
        "kv heads": f"{first.key_shape[1]} (group {first.group})" if first.group else "",
        "mask": first.mask + (", elided" if first.mask_elided else ""),
        "decision": first.decision,
        "runs": first.branch,
        "scores": first.scores,
        "kernels": first.kernels,
        "cache state": ": ".join(filter(None, (first.cache_state, first.cache_detail))),
        "config": ", ".join(f"{name}={value}" for name, value in first.config.items()),
        "guard": first.guard + (" (dynamic)" if first.guard_dynamic else ""),
        "why": _why(first),
    }


def _why(site: SiteReport) -> str:
    """Why a site stays dense, or why it does without the Triton kernels on a GPU, or without a proof of its mask."""
    if site.decision != "switchable":
        return f"{site.reason}: {site.explanation}"
    refusal = f"not triton: {site.refusal}" if site.refusal else ""
    return "; ".join(filter(None, (refusal, site.mask_origin)))


def _runs_of_equal_sites(sites: list[SiteReport]) -> list[list[SiteReport]]:
    """Neighbouring sites whose lines in the table differ in their place only, put together."""
    runs: list[list[SiteReport]] = []
    for site in sites:
        if runs and _without_place(runs[-1][-1]) == _without_place(site):
            runs[-1].append(site)
        else:
            runs.append([site])
    return runs


def _without_place(site: SiteReport) -> dict[str, str]:
    return {name: text for name, text in _cells([site]).items() if name not in _PLACE}


def describe_site(
    graph: int,
    number: int,
    plan: SitePlan,
    guard: LengthGuard | None,
    outcome: Outcome,
    default: SparseAttentionConfig,
) -> SiteReport:
    """The report row of a site.

    Args:
        graph: number of the compiled graph.
        number: number of the site in the graph.
        plan: the site's plan.
        guard: the outcome of the length switch; None for a site that has none.
        outcome: what the site was rewritten to.
        default: what sites are configured with unless the user's function says otherwise.
    """
    site = plan.site
    if not isinstance(site, PartialSite) and not site.masks:
        outcome = replace(outcome, mask_elided=True)
    return SiteReport.of(_facts(graph, number, plan), _decision(plan, guard, default), outcome)


def _facts(graph: int, number: int, plan: SitePlan) -> SiteFacts:
    site = plan.site
    example = example_of(site.node)
    tensors = () if isinstance(site, PartialSite) else (site.shape(site.query), site.shape(site.key_heads))
    shapes = [tuple(map(_readable_size, shape)) for shape in tensors] or [(), ()]
    return SiteFacts(
        graph=graph,
        site=number,
        module=site.module_path,
        source=site.source_line,
        query_shape=shapes[0],
        key_shape=shapes[1],
        dtype=str(getattr(example, "dtype", "")).removeprefix("torch."),
        device=str(getattr(example, "device", "")),
        group=0 if isinstance(site, PartialSite) or not (plan.causal or plan.switchable) else _group(site),
    )


def _decision(plan: SitePlan, guard: LengthGuard | None, default: SparseAttentionConfig) -> SiteDecision:
    return SiteDecision(
        mask=plan.mask_verdict,
        decision="switchable" if plan.switchable else "dense",
        branch=(guard.branch if guard is not None else Branch.DENSE).value,
        guard=guard.expression if guard is not None else "",
        guard_dynamic=guard is not None and guard.dynamic,
        reason=plan.reason.name,
        explanation="; ".join(filter(None, (plan.detail, plan.reason.value))),
        config=_differing(plan.config or default, default),
        dense_len_origin=plan.dense_len_origin,
        mask_origin=plan.mask_origin,
        scores=plan.scores if plan.switchable else "",
        channels=(plan.channels or ()) if plan.switchable else (),
        traceback="" if plan.error is None else "".join(traceback.format_exception(plan.error)),
    )


def _differing(config: SparseAttentionConfig, default: SparseAttentionConfig) -> dict[str, Any]:
    known = default.to_dict()
    return {name: value for name, value in config.to_dict().items() if value != known[name]}


def _group(site: AttentionSite) -> int:
    return int(site.query_heads) // int(site.kv_heads)


def _readable_size(extent: int | torch.SymInt) -> int | str:
    return extent if isinstance(extent, int) else str(extent)


__all__ = ["GraphReport", "Reason", "Report", "SiteDecision", "SiteFacts", "SiteReport", "Uncompiled", "describe_site"]
