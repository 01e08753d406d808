"""All faults in turn, as many as time permits, and what came of them in numbers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count, product

from tests.robustness.faults import damage, disks, kills, ranks
from tests.robustness.faults.cases import Case, Material, Undisturbed, undisturbed
from tests.robustness.faults.child import Ended, Fault
from tests.robustness.faults.judge import KINDS, Finding

Job = partial[tuple[Ended, list[Finding]]]


@dataclass
class Row:
    """One kind of fault: its jobs, shuffled, and what was found."""

    name: str
    jobs: Iterator[Job]
    possible: int | None  # None: without end
    injected: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    found: list[str] = field(default_factory=list)

    def step(self) -> bool:
        """Do one; whether there was one."""
        job = next(self.jobs, None)
        if job is None:
            return False
        ended, found = job()
        self.injected += ended.struck is not None
        for one in found:
            self.counts[one.kind] += 1
            what = [word for word in job.args if isinstance(word, str | Case | Fault | disks.Shortage)]
            self.found.append(f"{self.name}: {one.kind}: {one.text}\n  {what}\n{ended.err}")
        return True


def rows(made: Material, cases: Sequence[Case], seed: int, several: bool = True) -> list[Row]:
    """Every kind of fault, on these commands.

    Args:
        made: what the commands work on.
        cases: commands to disturb.
        seed: of the order of moments, and of what is damaged where.
        several: torchrun's processes too, seconds each.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not forked"  # noqa: PTH208
    normal = cache(lambda case: undisturbed(case, made))
    listed = [*_struck(made, cases, normal), *_short_of_room(made, cases, normal)]
    if several:
        stops = product((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (0, 1), (False, True))
        listed.append(("one of two processes stopped", [partial(ranks.strike_a_rank, *one) for one in stops]))
    choose = random.Random(seed)
    for _, jobs in listed:
        choose.shuffle(jobs)
    found = [Row(name, iter(jobs), len(jobs)) for name, jobs in listed]
    for what in damage.DAMAGES:
        found.append(Row(f"{what} in a file that is read", _damaged(what, made, seed), None))
    found.append(Row("shards mixed up", _mixed(made, seed), None))
    return [*found, Row("kept work damaged", _resumed(made, cases, normal, seed), None)]


_Normal = Callable[[Case], Undisturbed]


def _struck(made: Material, cases: Sequence[Case], normal: _Normal) -> Iterator[tuple[str, list[Job]]]:
    for name, (what, clock) in kills.FAULTS.items():
        every = [(case, fault) for case in cases for fault in kills.moments(what, clock, normal(case))]
        yield name, [partial(kills.strike, case, fault, made, normal(case)) for case, fault in every]


def _short_of_room(made: Material, cases: Sequence[Case], normal: _Normal) -> Iterator[tuple[str, list[Job]]]:
    mounts = disks.can_mount()
    every = [(case, short) for case in cases for short in disks.shortages(normal(case), mounts)]
    for what in dict.fromkeys(short.what for _, short in every):
        these = [(case, short) for case, short in every if short.what == what]
        yield what, [partial(disks.run_short, case, short, made, normal(case)) for case, short in these]


def _damaged(what: str, made: Material, seed: int) -> Iterator[Job]:
    for k in count():
        for subject in damage.SUBJECTS:
            choose = random.Random(f"{seed} {k} {subject} {what}")
            yield partial(damage.damaged, subject, what, made, choose)


def _mixed(made: Material, seed: int) -> Iterator[Job]:
    for k in count():
        choose = random.Random(f"{seed} {k}")
        what = sorted(damage.SHARD_DAMAGES)[k % len(damage.SHARD_DAMAGES)]
        yield partial(damage.mixed_up, choose.choice(("m", "d")), what, made, choose)


def _resumed(made: Material, cases: Sequence[Case], normal: _Normal, seed: int) -> Iterator[Job]:
    keeping = [case for case in cases if "--resume" in case.arguments and not case.old]
    for k in count() if keeping else ():
        choose = random.Random(f"{seed} {k}")
        case, what = choose.choice(keeping), choose.choice(sorted(damage.DAMAGES))
        yield partial(damage.resumed, case, what, made, normal(case), choose)


def run(all_rows: list[Row], each: int | None = None, seconds: float | None = None) -> None:
    """One fault of each kind after the other, until each has had its number, or the time is over."""
    start, left = time.monotonic(), list(all_rows)
    for turn in count():
        if not left or turn == each:
            return
        for row in list(left):
            if seconds is not None and time.monotonic() - start > seconds:
                return
            if not row.step():
                left.remove(row)
