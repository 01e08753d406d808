"""Disks that fill up, files that may not grow, and places where nothing may be written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.robustness.faults.cases import Case, Material, Undisturbed
from tests.robustness.faults.child import Ended, attempt, command
from tests.robustness.faults.judge import Before, Finding, judge_words

_PAGE = 4096  # bytes
_STEPS = 24


@dataclass(frozen=True)
class Shortage:
    """A disk of ``size`` bytes (0: read-only), or, with ``each``, a limit on every single file."""

    size: int
    each: bool = False

    @property
    def what(self) -> str:
        """For tables."""
        return "file too large" if self.each else "full disk" if self.size else "read-only disk"


def can_mount() -> bool:
    """Whether a small file system can be mounted here."""
    try:
        with TemporaryDirectory() as folder, _mounted(Path(folder), "size=64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def _mounted(place: Path, options: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def shortages(normal: Undisturbed, mounts: bool) -> Iterator[Shortage]:
    """From next to nothing to what would do."""
    needed, largest = sum(map(len, normal.new.values())), max(map(len, normal.new.values()))
    if mounts:
        yield Shortage(0)
        for part in range(1, _STEPS + 1):
            yield Shortage(-(-3 * needed * part // (_STEPS * _PAGE)) * _PAGE)
    for part in range(_STEPS):
        yield Shortage(_PAGE + largest * part // _STEPS, each=True)  # a page for the command's own words


def run_short(
    case: Case, short: Shortage, made: Material, normal: Undisturbed
) -> tuple[Ended, list[Finding]]:
    """The command with that little room; the output goes to a disk of its own, where there is no old one."""
    output = f"disk/{case.output}"
    words = [output if word == case.output else word for word in case.arguments]
    with made.copied(replace(case, old=False)) as folder, ExitStack() as mounted:
        (folder / "disk").mkdir()
        before = Before.of(folder, output, normal.new)
        if not short.each:
            mounted.enter_context(_mounted(folder / "disk", f"size={short.size}" if short.size else "ro"))
        ended = attempt(command(*words), folder, file_size=short.size if short.each else None)
        found = [*judge_words(ended, (0, 1))]
        found += before.judge_files(folder, ended, lambda name: name in (*case.kept, *case.aside))
        return replace(ended, struck=short.what, begun=True), found
