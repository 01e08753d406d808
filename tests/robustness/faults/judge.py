"""What may be found after a fault, and what may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.faults.child import Ended
from tests.support.checkpoints import contents

_STATUS = {"SIGKILL": (-9,), "SIGINT": (130,), "SIGTERM": (143,)}
_MESSAGES = ("error: ", "stopped at step ")  # the latter of a training that can go on
_MARKS_OF_A_CRASH = ("Traceback", "Exception ignored", "Aborted", "Fatal Python error")

# What may not be, and what a table calls it.
KINDS = {
    "loss": "losses",
    "hang": "hangs",
    "words": "crashes, or not one message",
    "debris": "left behind",
}


@dataclass(frozen=True)
class Finding:
    """One of ``KINDS``."""

    kind: str
    text: str


def judge_words(ended: Ended, allowed: tuple[int, ...]) -> Iterator[Finding]:
    """One message for a failure, none for a success, and an exit status that is allowed."""
    if ended.hung:
        yield Finding("hang", "it did not end")
        return
    if ended.status not in allowed:
        yield Finding("words", f"exit status {ended.status}, not {' or '.join(map(str, allowed))}")
    errors = sum(line.startswith(_MESSAGES) for line in ended.err.splitlines())
    if errors != (ended.status > 0) and (errors or ended.begun or ended.struck is None):
        yield Finding("words", f"{errors} messages at exit status {ended.status}")
    for mark in _MARKS_OF_A_CRASH:
        if mark in ended.err:
            yield Finding("words", f"{mark!r} on stderr")


def statuses(fault: str) -> tuple[int, ...]:
    """Exit statuses that are right after a signal, or an error of the system, by its name."""
    return _STATUS.get(fault, (1,))


@dataclass(frozen=True)
class Before:
    """A folder before a command: its inputs, the old output, and what the new one will be."""

    inputs: dict[str, bytes]
    output: str
    old: dict[str, bytes]  # empty where there is none
    new: dict[str, bytes]

    @staticmethod
    def of(folder: Path, output: str, new: dict[str, bytes]) -> Before:
        """As it is now."""
        old = _held(folder, output)
        inputs = {name: data for name, data in contents(folder).items() if not _is_under(name, output)}
        return Before(inputs, output, old, new)

    def judge_files(self, folder: Path, ended: Ended, left: Callable[[str], bool]) -> Iterator[Finding]:
        """Inputs as they were; the output old or new, and whole; besides it what ``left`` permits."""
        found = contents(folder)
        for name, data in self.inputs.items():
            if found.get(name) != data:
                yield Finding("loss", f"input {name} was changed")
        held = _held(folder, self.output)
        if held not in (self.old, self.new):
            yield Finding("loss", f"{self.output} is neither the old output nor the new one")
        if ended.status == 0 and held != self.new:
            yield Finding("loss", "it said that all is well, and there is no new output")
        told = {"is as it was": self.old, "is not written": {}, "is written": self.new}
        for said, held_then in told.items():
            if f"note: {self.output} {said}" in ended.err and held != held_then:
                yield Finding("words", f"it said that {self.output} {said}, which is not so")
        output = folder / self.output
        known = {folder / name.split("/")[0] for name in (*self.inputs, self.output)} | {output}
        for path in {*folder.iterdir(), *output.parent.iterdir()} - known:
            if not left(path.name):
                yield Finding("debris", f"{path.name} is left behind")


def _held(folder: Path, output: str) -> dict[str, bytes]:
    path = folder / output
    return contents(path) if path.exists() else {}


def _is_under(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}/")
