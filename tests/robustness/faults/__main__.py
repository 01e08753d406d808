"""Disturb mpoc in every way: ``python -m tests.robustness.faults --minutes 10 --seed 0``.

Prints a table of what was injected and what came of it, and every finding in full.
"""

from __future__ import annotations

import argparse
import sys

from tests.robustness.faults.campaign import Row, rows, run
from tests.robustness.faults.cases import CASES, material
from tests.robustness.faults.judge import KINDS


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="default: until nothing is left, which takes hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of faults whose name has this in it")
    options = parser.parse_args()
    with material() as made:
        chosen = [row for row in rows(made, CASES, options.seed) if options.only in row.name]
        try:
            run(chosen, seconds=None if options.minutes is None else 60 * options.minutes)
        except KeyboardInterrupt:
            print("interrupted; so far:")
    print(table(chosen))
    for text in (text for row in chosen for text in row.found):
        print(text)
    return 1 if any(row.found for row in chosen) else 0


def table(chosen: list[Row]) -> str:
    """In Markdown."""
    heads = ["fault", "possible", "injected", *KINDS.values()]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --: |" * (len(heads) - 1)]
    for row in chosen:
        possible = "" if row.possible is None else f"{row.possible:,}"
        lines.append(f"| {row.name} | {possible} | {row.injected:,} | {_cells(row.counts)} |")
    sums = {kind: sum(row.counts[kind] for row in chosen) for kind in KINDS}
    lines.append(f"| all | | {sum(row.injected for row in chosen):,} | {_cells(sums)} |")
    return "\n".join(lines)


def _cells(counts: dict[str, int]) -> str:
    return " | ".join(str(counts[kind]) for kind in KINDS)


if __name__ == "__main__":
    sys.exit(main())
