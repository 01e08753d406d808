"""Fuzz mpoc's readers: ``python tests/robustness/fuzz/fuzz.py --minutes 10 --target manifest``.

Says how many inputs were run, how many pairs of lines they reached, and every fault with the input that it
came from (kept in ``--out``).  Should the process itself die, the input that killed it is ``OUT/current``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.robustness.fuzz.engine import Found, fuzz, limit_memory
from tests.robustness.fuzz.targets import TARGETS


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where inputs that fail are kept; default: a new folder")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="mpoc-faults-"))
    out.mkdir(parents=True, exist_ok=True)
    limit_memory()
    found = fuzz(
        TARGETS[options.target],
        options.seed,
        seconds=60 * options.minutes,
        before=lambda data: _keep(out / "current", data),
        tell=lambda found: _progress(options.target, found),
    )
    (out / "current").unlink()
    for k, (place, (data, error)) in enumerate(found.faults.items()):
        (out / f"{options.target}-{options.seed}-{k}").write_bytes(data)
        print(f"fault: {place}: {out / f'{options.target}-{options.seed}-{k}'}")
        traceback.print_exception(error, limit=-4, file=sys.stdout)
    _progress(options.target, found)
    return 1 if found.faults else 0


def _keep(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def _progress(target: str, found: Found) -> None:
    print(
        f"{target}: {found.executions:,} executions in {found.seconds:.0f} s, {len(found.seen):,} pairs of "
        f"lines from {len(found.kept):,} inputs, {len(found.faults)} faults",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
