"""All faults in turn, as many as time permits, and what came of them in numbers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count

from tests.faults import damage, disks, kills, ranks
from tests.faults.cases import Case, Material, Undisturbed, undisturbed
from tests.faults.child import Ended, Fault
from tests.faults.judge import KINDS, Finding

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
    choose = random.Random(seed)

    def listed(name: str, jobs: list[Job]) -> Row:
        choose.shuffle(jobs)
        return Row(name, iter(jobs), len(jobs))

    found = []
    for name, (what, clock) in kills.FAULTS.items():
        every = [(case, fault) for case in cases for fault in kills.moments(what, clock, normal(case))]
        found.append(listed(name, [partial(kills.strike, c, f, made, normal(c)) for c, f in every]))
    mounts = disks.can_mount()
    short = [(case, one) for case in cases for one in disks.shortages(normal(case), mounts)]
    for what in dict.fromkeys(one.what for _, one in short):
        jobs: list[Job] = [
            partial(disks.run_short, case, one, made, normal(case)) for case, one in short if one.what == what
        ]
        found.append(listed(what, jobs))
    found += [
        Row(
            f"{what} in a file that is read",
            _endless(damage.SUBJECTS, damage.damaged, what, made, seed),
            None,
        )
        for what in damage.DAMAGES
    ]
    found.append(Row("shards mixed up", _mixed(made, seed), None))
    found.append(Row("kept work damaged", _resumed(made, cases, normal, seed), None))
    if several:
        signals = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
        late = [(s, rank, late) for s in signals for rank in (0, 1) for late in (False, True)]
        found.append(
            listed("one of two processes stopped", [partial(ranks.strike_a_rank, *one) for one in late])
        )
    return found


def _endless(
    subjects: dict[str, list[damage.Use]],
    hurt: Callable[[str, str, Material, random.Random], tuple[Ended, list[Finding]]],
    what: str,
    made: Material,
    seed: int,
) -> Iterator[Job]:
    for k in count():
        for subject in subjects:
            yield partial(hurt, subject, what, made, random.Random(f"{seed} {k} {subject} {what}"))


def _mixed(made: Material, seed: int) -> Iterator[Job]:
    for k in count():
        choose = random.Random(f"{seed} {k}")
        what = sorted(damage.SHARD_DAMAGES)[k % len(damage.SHARD_DAMAGES)]
        yield partial(damage.mixed_up, choose.choice(("m", "d")), what, made, choose)


def _resumed(
    made: Material, cases: Sequence[Case], normal: Callable[[Case], Undisturbed], seed: int
) -> Iterator[Job]:
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
