"""The zoo's results as a table for people, and as decisions that tests compare."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infllm_pass.plan.planner import Reason

from .channels import section
from .examination import COVERING, TOLERANCES, Finding
from .running import ROOT, Result
from .specimens import LENGTH, Kind
from .truth import causes_of

TABLE = ROOT / "docs" / "zoo.md"
DECISIONS = Path(__file__).parent / "expected.json"

_HEAD = f"""# Zoo

<!-- Written by `make zoo`. -->

Every causal language model of the pinned transformers that builds offline, and models written outside it, made small
and random, through the pass: {{specimens}} pairs of architecture and attention implementation from {{architectures}}
architectures.

- **attention**: softmaxes over keys and calls of fused attention in the traced graphs, counted without the matcher.
- **plain**, **padded**, **packed**: of these, how many became switchable, in a batch of one row, in one whose rows are
  padded left, right and not at all, and in one of packed sequences (`position_ids` that restart). *n/a*: the model
  itself takes no such batch.
- **error**: a bound on the largest relative error of any valid position's logits over all batches, and of all gradients
  of a training step: with a budget that covers the {LENGTH} tokens against the model run eagerly, and with one that
  covers 40 against the same graph with its sites computed by the float64 oracle. Models run in float64, those of
  implementation *eager* in float32.
- **dense**: the reasons that the pass gives for sites that stay dense, and what is true of the model.

"""


def decisions(results: Sequence[Result]) -> dict[str, Any]:
    """What must not drift, by family and architecture."""
    found: dict[str, Any] = {}
    for result in results:
        entry = {"unbuilt": result.unbuilt} if result.unbuilt else result.decisions()
        found.setdefault(result.family, {})[result.architecture] = entry
    return found


def dump(decided: dict[str, Any]) -> str:
    """The decisions as JSON with a line for each architecture."""
    families = []
    for family, entries in decided.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        families.append(f" {json.dumps(family)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(families) + "\n}\n"


def markdown(results: Sequence[Result]) -> str:
    """The page: totals, a table for each family, and what cannot be built."""
    built = [result for result in results if not result.unbuilt]
    pairs = sum(len(result.findings) for result in built)
    parts = [_HEAD.format(specimens=pairs, architectures=len(built)), _totals(results)]
    for family in dict.fromkeys(result.family for result in results):
        parts.append(f"\n## {family[0].upper()}{family[1:]}\n\n")
        parts.append("| architecture | implementation | attention | plain | padded | packed | error | dense |\n")
        parts.append("|---|---|---|---|---|---|---|---|\n")
        parts += [line for result in built if result.family == family for line in _lines(result)]
    unbuilt = [result for result in results if result.unbuilt]
    if unbuilt:
        parts.append("\n## Not built\n\n| architecture | why |\n|---|---|\n")
        parts += [f"| {result.architecture} | {_cell(result.unbuilt)} |\n" for result in unbuilt]
    return "".join(parts) + section()


def _lines(result: Result) -> Iterator[str]:
    for implementation, kinds in result.findings.items():
        cells = [
            result.architecture,
            implementation,
            str(max(finding.calls for finding in kinds.values())),
            *(_share(kinds.get(kind.value)) for kind in Kind),
            _bound(kinds),
            _dense(result.architecture, kinds),
        ]
        yield "| " + " | ".join(cells) + " |\n"


def _share(finding: Finding | None) -> str:
    if finding is None:
        return "-"
    if finding.unusable:
        return "n/a"
    return "error" if finding.error else f"{finding.switchable}/{finding.calls}"


def _bound(kinds: dict[str, Finding]) -> str:
    worst = [finding.worst for finding in kinds.values() if finding.worst is not None]
    if not worst or any(finding.error for finding in kinds.values()):
        return "-"
    bound = next(bound for bound in (1e-12, 1e-9, *sorted(TOLERANCES.values()), math.inf) if max(worst) <= bound)
    return f"{bound:.0e}" if all(finding.equal for finding in kinds.values()) else f"**{max(worst):.0e}**"


def _dense(architecture: str, kinds: dict[str, Finding]) -> str:
    reasons = sorted({reason for f in kinds.values() for reason in f.reasons if reason != Reason.SWITCHABLE.name})
    missed = any(finding.calls > finding.sites for finding in kinds.values())
    errors = sorted({finding.error for finding in kinds.values() if finding.error})
    if not reasons and not missed and not errors:
        return ""
    named = reasons + ["not a site"] * missed + errors
    true = causes_of(architecture)
    causes = "; ".join(cause.text for cause in true if missed or not set(reasons).isdisjoint(cause.reasons))
    return _cell(", ".join(named) + (f": {causes}" if causes else ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _totals(results: Sequence[Result]) -> str:
    lines = ["| | architectures | not built | pairs | comparisons | unequal | attention | sites | switchable |\n"]
    lines.append("|---|---|---|---|---|---|---|---|---|\n")
    reasons: Counter[str] = Counter()
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        found = [f for result in own for kinds in result.findings.values() for f in kinds.values() if not f.unusable]
        for finding in found:
            reasons.update(finding.reasons)
        cells = [
            *(len(own), sum(bool(result.unbuilt) for result in own), sum(len(result.findings) for result in own)),
            *(len(found), sum(not finding.equal for finding in found), sum(finding.calls for finding in found)),
            *(sum(finding.sites for finding in found), sum(finding.switchable for finding in found)),
        ]
        lines.append(f"| {family} | " + " | ".join(map(str, cells)) + " |\n")
    lines.append("\nSites by reason, over all batches: ")
    lines.append(", ".join(f"{name} {count}" for name, count in sorted(reasons.items(), key=lambda item: -item[1])))
    return "".join(lines) + f".\n\nThe covering budget visits {COVERING.visited_tokens} tokens.\n"
