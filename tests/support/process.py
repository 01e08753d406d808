"""The ``mpoc`` command as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from mpoc.cli.app import app

_ROOT = Path(__file__).resolve().parents[2]
# What makes rich and typer colour a pipe, or not a terminal, or change its width.
_COLOURS = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "COLUMNS")
_LONGEST = 300  # seconds; a process that takes more hangs


class Mpoc:
    """Runs ``python -m mpoc`` with the interpreter of the tests; everything it writes lands in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run to the end; stdout and stderr apart, as text."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=_LONGEST)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *arguments: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start and return at once; the ``run`` fixture ends what still runs after the test."""
        return self._start(["-m", "mpoc"], arguments, stderr)

    def after(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """As a call, in a process that runs ``code`` first."""
        process = self._start(["-c", f"{code}\nfrom mpoc.cli.app import main\nmain()"], arguments)
        out, err = process.communicate(timeout=_LONGEST)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def without(self, package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """As a call, where ``package`` is not installed."""
        return self.after(f"import sys; sys.modules[{package!r}] = None", *arguments)

    def _start(
        self, program: list[str], arguments: tuple[object, ...], stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        # A background job ignores Ctrl-C and hands that on; the tests send one.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        self.started.append(process)
        return process


class Here:
    """Runs ``mpoc`` in this process, in ``folder``: where a process of its own is not what is tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """As :class:`Mpoc`; what a process would show as a traceback is raised."""
        words = [*map(str, arguments)]
        result = CliRunner().invoke(app, words)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def run_python(*arguments: object) -> str:
    """Standard output of a Python of its own; fails with its stderr where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=_LONGEST,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """This process's, with the package importable from any folder, and the same output everywhere."""
    kept = {name: value for name, value in os.environ.items() if name not in _COLOURS}
    own = {"PYTHONPATH": str(_ROOT), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    return kept | own
