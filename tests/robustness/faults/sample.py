"""A few faults of every kind, the same each time, and that the harness sees what it is to see; as JSON."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from tests.robustness.faults import child
from tests.robustness.faults.campaign import rows, run
from tests.robustness.faults.cases import CASES, Case, Material, material, undisturbed
from tests.robustness.faults.kills import strike


def main() -> None:
    """A few seconds."""
    with material() as made:
        found = rows(made, CASES[3::5], seed=0, several=False)
        run(found, each=2)
        said = {
            "injected": {row.name: row.injected for row in found},
            "found": [text for row in found for text in row.found],
            "careless": _of_a_careless_one(CASES[4], made),
            "hung": _hangs(),
        }
    print(json.dumps(said))


def _of_a_careless_one(case: Case, made: Material) -> dict[str, int]:
    """What is found where ``expand`` writes in place, tidies nothing up, and lets errors through."""
    normal = undisturbed(case, made)
    seen: Counter[str] = Counter()
    with (
        patch("mpoc.compression.expand.staged", _in_place),
        patch("mpoc.cli.options.reported_errors", nullcontext),
    ):
        for what, clock in (("ENOSPC", "changes"), ("SIGINT", "files"), ("SIGKILL", "files")):
            fault = child.Fault(what, clock, normal.moments[clock] // 2)
            seen.update(one.kind for one in strike(case, fault, made, normal)[1])
    return dict(seen)


@contextmanager
def _in_place(output: Path) -> Iterator[Path]:
    output.with_name("scratch").touch()
    yield output


def _hangs() -> bool:
    child.LONGEST = 0.2
    return child.attempt(lambda: time.sleep(600), Path("/")).hung


if __name__ == "__main__":
    main()
