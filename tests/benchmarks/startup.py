"""Measure how long mpoc takes to start, as whole processes.

    python tests/benchmarks/startup.py COMPRESSED_FILE

Times ``python -c pass``, ``mpoc --help``, ``mpoc compress --help`` and ``mpoc report COMPRESSED_FILE``
by the wall clock, in turn so that a busy moment of the machine touches all of them, and prints the median
seconds of each and its ratio to the bare interpreter. One unmeasured round first fills the caches.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarking import markdown_table, mpoc_command, require_file


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one run; ends the benchmark if the command fails."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if result.returncode != 0:
        raise SystemExit(f"error: `{' '.join(command)}` exited with {result.returncode}\n{result.stderr}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a file written by mpoc compress")
    parser.add_argument("--runs", type=int, default=11, help="runs of each (default 11)")
    arguments = parser.parse_args()

    file = require_file(arguments.file, "compressed file")
    bare = "python -c pass"
    commands = {
        bare: [sys.executable, "-c", "pass"],
        "mpoc --help": mpoc_command("--help"),
        "mpoc compress --help": mpoc_command("compress", "--help"),
        "mpoc report": mpoc_command("report", file),
    }
    for command in commands.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            times[name].append(seconds(command))

    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [[name, f"{t:.3f}", f"{t / medians[bare]:.1f}"] for name, t in medians.items()]
    print(markdown_table(["process", "median s", f"/ {bare}"], rows))


if __name__ == "__main__":
    main()
