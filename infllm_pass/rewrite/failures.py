"""Failure policy: which internal errors and dense sites raise (``strict``), and warnings for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

from infllm_pass.errors import ConfigError, DenseSiteError, InternalError, InternalErrorWarning
from infllm_pass.rewrite.report import GraphReport, SiteReport

Strict: TypeAlias = bool | Literal["all"]
"""What is an error at a call: False: nothing; True: a failure of the pass; "all": any site that stays dense."""


def checked_strict(value: object) -> Strict:
    """A value of ``strict``.

    Raises:
        ConfigError: it is none of True, False and "all".
    """
    if isinstance(value, bool) or value == "all":
        return value
    raise ConfigError("strict", value, "True, False or 'all'")


def warn_of_failures(report: GraphReport, known: set[str]) -> None:
    """Warn of the sites of a graph at which the pass itself failed, once for each place in the code.

    Args:
        report: the graph's report.
        known: the places that were warned of so far; those of this graph are added.
    """
    failed: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        if site.traceback:
            frames = [line for line in site.traceback.splitlines() if line.startswith("  File ")]
            failed.setdefault("\n".join(frames), []).append(site)
    for place, sites in failed.items():
        if place not in known:
            known.add(place)
            script = f" and with the script that reproduces it ({sites[0].reproducer})" if sites[0].reproducer else ""
            warnings.warn(
                f"infllm_pass failed at {', '.join(map(_named, sites))} of graph {report.graph}, which stays as it "
                f"was; please report this, with the following text{script}:\n{sites[0].traceback}",
                InternalErrorWarning,
                stacklevel=3,
            )


def refuse(strict: Strict, report: GraphReport, errors: Sequence[Exception | None], exempt: Sequence[bool]) -> None:
    """Refuse a rewritten graph that does not hold to ``strict``.

    Args:
        strict: what was asked for.
        report: the graph's report.
        errors: for each of its sites, what the pass failed with.
        exempt: for each of them, whether the user wants it dense.

    Raises:
        InternalError: the pass failed at a site.
        DenseSiteError: with "all", a site stays dense.
    """
    if not strict:
        return
    for site, error in zip(report.sites, errors, strict=True):
        if error is not None:
            raise InternalError(f"graph {report.graph}, {_named(site)}", error) from error
    dense = [
        site for site, excused in zip(report.sites, exempt, strict=True) if site.decision == "dense" and not excused
    ]
    if strict == "all" and dense:
        raise DenseSiteError(tuple(f"graph {s.graph}, {_named(s)}: {s.reason}: {s.explanation}" for s in dense))


def _named(site: SiteReport) -> str:
    return f"site {site.site} {site.module or site.source}".rstrip()
