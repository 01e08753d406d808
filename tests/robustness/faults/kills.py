"""Signals, and errors of the system, at each moment of each command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.robustness.faults.cases import Case, Material, Undisturbed
from tests.robustness.faults.child import Ended, Fault, attempt, command
from tests.robustness.faults.judge import Before, Finding, judge_words, statuses
from tests.support.checkpoints import contents

# What may come, by which clock, and what a table calls it.
FAULTS = {
    "SIGKILL, file operations": ("SIGKILL", "files"),
    "SIGINT, file operations": ("SIGINT", "files"),
    "SIGINT, lines": ("SIGINT", "lines"),
    "SIGTERM, file operations": ("SIGTERM", "files"),
    "SIGTERM, lines": ("SIGTERM", "lines"),
    "no space, at each change": ("ENOSPC", "changes"),
    "quota, at each change": ("EDQUOT", "changes"),
    "no permission, at each change": ("EACCES", "changes"),
    "error of the disk, at each change": ("EIO", "changes"),
    "error of the disk, at each read": ("EIO", "reads"),
}


def moments(what: str, clock: str, normal: Undisturbed) -> list[Fault]:
    """All of a case's."""
    return [Fault(what, clock, at) for at in range(1, normal.moments[clock] + 1)]


def strike(case: Case, fault: Fault, made: Material, normal: Undisturbed) -> tuple[Ended, list[Finding]]:
    """One fault, what it led to, and whether the same command then goes through."""
    with made.copied(case) as folder:
        before = Before.of(folder, case.output, normal.new)
        ended = attempt(command(*case.arguments), folder, fault)
        found = list(_judge(before, case, fault, folder, ended))
        if fault.what == "SIGKILL" or (case.kept and fault.clock == "files"):
            found += _go_on(before, case, fault, folder)
        return ended, found


def _judge(before: Before, case: Case, fault: Fault, folder: Path, ended: Ended) -> Iterator[Finding]:
    allowed = statuses(fault.what)
    # A copy can be made by other means, and a folder may be there; a training hears a signal after a step,
    # and none follows the last.
    harmless = ended.struck in ("copy", "mkdir") and not fault.what.startswith("SIG")
    if ended.struck is None or ((harmless or case.aside) and ended.status == 0):
        allowed = (0,)
    elif not ended.begun and fault.what == "SIGTERM":
        allowed = (143, -15)
    yield from judge_words(ended, allowed)

    def left(name: str) -> bool:
        hidden = fault.what == "SIGKILL" and name.startswith(".") and name.endswith(".partial")
        return hidden or name in (*case.kept, *case.aside)

    yield from before.judge_files(folder, ended, left)


def _go_on(before: Before, case: Case, fault: Fault, folder: Path) -> Iterator[Finding]:
    """The same command, with ``--force`` where the output has been put in place."""
    whole = contents(folder / case.output) == before.new if (folder / case.output).exists() else False
    more = []
    if case.arguments[0] == "finetune" and (folder / case.kept[0]).exists():
        more = ["--resume"]
    elif any((folder / name).exists() for name in case.aside):  # a log, and no checkpoint yet
        more = ["--force"]
    if whole and "--force" not in case.arguments:
        more = ["--force"]
    ended = attempt(command(*case.arguments, *more), folder)
    for one in judge_words(ended, (0,)):
        yield Finding(one.kind, f"the next run: {one.text}\n{ended.err}")
    for one in before.judge_files(folder, ended, lambda name: name.startswith(".") or name in case.aside):
        yield Finding(one.kind, f"after the next run: {one.text}")
