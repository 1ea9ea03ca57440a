"""``python -m tests.zoo``: examine the zoo, write the table and the decisions; with names, show those alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .channels import write_record
from .running import FAMILIES, Result, names, run_zoo, serve
from .table import DECISIONS, TABLE, decisions, dump, markdown


def main() -> int:
    """Run as the arguments say; the exit status is 1 where numbers differ or an architecture gave no answer."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="architectures to examine; without any: all, and the files are written"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--results",
        type=Path,
        help="file that each result is appended to; architectures that it holds already are not examined again",
    )
    parser.add_argument("--channels", action="store_true", help="read the rotary embeddings of keys, and nothing else")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return 0
    if arguments.channels:
        chosen = [place for place in names() if not arguments.names or place[1] in arguments.names]
        write_record((family, name, FAMILIES[family].specimens(name)) for family, name in chosen)
        return 0
    wanted = [place for place in names() if not arguments.names or place[1] in arguments.names]
    found = {result.place: result for result in _kept(arguments.results)}
    for result in run_zoo([place for place in wanted if place not in found], arguments.workers):
        found[result.place] = result
        if arguments.results is not None and not result.lost:
            with arguments.results.open("a") as file:
                print(result.to_json(), file=file)
        _show(result)
    results = [found[place] for place in wanted]
    lost = any(result.lost for result in results)
    if not arguments.names and not lost:
        TABLE.write_text(markdown(results))
        DECISIONS.write_text(dump(decisions(results)))
    unequal = any(not finding.equal for r in results for kinds in r.findings.values() for finding in kinds.values())
    return int(lost or unequal)


def _kept(path: Path | None) -> list[Result]:
    if path is None or not path.exists():
        return []
    return [Result.from_json(line) for line in path.read_text().splitlines()]


def _show(result: Result) -> None:
    if result.unbuilt:
        print(f"{result.architecture}: cannot be built: {result.unbuilt}", flush=True)
    for implementation, kinds in result.findings.items():
        for kind, finding in kinds.items():
            verdict = "equal" if finding.equal else f"DIFFERS {finding.error}"
            print(f"{result.architecture}/{implementation} {kind}: {verdict} {finding}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
