"""What the benchmark scripts share: running mpoc as a process, and printing a table."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def mpoc_command(*arguments: str | Path) -> list[str]:
    """The command line that runs mpoc with this Python.

    Raises SystemExit where mpoc is not installed for this Python.
    """
    if importlib.util.find_spec("mpoc") is None:
        raise SystemExit(
            f"error: mpoc is not installed for {sys.executable}\n"
            "hint: run `pip install -e .` in the repository first"
        )
    return [sys.executable, "-m", "mpoc", *map(str, arguments)]


def run_mpoc(*arguments: str | Path) -> str:
    """Run mpoc and return its stdout; a failing command ends the benchmark with its stderr."""
    command = mpoc_command(*arguments)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"error: `{' '.join(command[1:])}` exited with {result.returncode}\n{result.stderr}")
    return result.stdout


def require_file(path: Path, what: str) -> Path:
    """The path itself, or SystemExit that says what is missing and where it was expected."""
    if not path.is_file():
        raise SystemExit(f"error: no {what} at {path}")
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: the first column to the left, the others to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
