"""A small coverage-guided fuzzer: inputs that reach new lines of mpoc are kept and changed further.

Coverage is that of Python's own tracing on mpoc's files, as pairs of lines run one after another.  An input
may end in an answer or in an ``MpocError``; anything else, or too much time or memory, is a fault.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import mpoc
from mpoc.errors import MpocError

_PACKAGE = str(Path(mpoc.__file__).parent)
_LONGEST = 10  # seconds an input may take
_ROOM = 3 << 30  # bytes of address space beyond what the process has when it begins

Line = tuple[str, int, int]


class TookTooLong(BaseException):
    """No handler of the code under test takes this for its own."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed: where inputs come from, how they are changed, what is done with one."""

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[bytes], None]


@dataclass
class Found:
    """What a run of the fuzzer found."""

    executions: int = 0
    seconds: float = 0.0
    seen: set[Line] = field(default_factory=set)
    kept: list[bytes] = field(default_factory=list)
    faults: dict[str, tuple[bytes, BaseException]] = field(default_factory=dict)  # where raised → the first


def traced(call: Callable[[], None]) -> set[Line]:
    """Run ``call``; the pairs of lines of mpoc that it ran one after another."""
    seen: set[Line] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE):
            return None
        last = 0

        def step(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                seen.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)
    return seen


def fault_of(target: Target, data: bytes, seen: set[Line] | None = None) -> BaseException | None:
    """What goes wrong with an input; lines that it reaches are added to ``seen``."""
    reached: set[Line] = set()

    def run() -> None:
        try:
            target.run(data)
        except MpocError as error:
            told = f"{error} {error.hint}"
            assert told.strip() and len(told) < 20_000, "a message that nobody can read"

    try:
        with _within(_LONGEST):
            if seen is None:
                run()
            else:
                reached = traced(run)
    except (Exception, TookTooLong) as error:
        return error
    if seen is not None:
        seen |= reached
    return None


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def place_of(error: BaseException) -> str:
    """Kind of error and the innermost line of mpoc that it came through: one fault, one place."""
    trace, place = error.__traceback__, "outside"
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            place = f"{Path(name).relative_to(_PACKAGE)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


def limit_memory() -> None:
    """This process may not grow by more than a few gigabytes: asking for more fails at once."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))


def fuzz(
    target: Target,
    seed: int,
    executions: int | None = None,
    seconds: float | None = None,
    corpus: list[bytes] | None = None,
    before: Callable[[bytes], None] = lambda _: None,
    tell: Callable[[Found], None] = lambda _: None,
) -> Found:
    """Run a target on changed inputs.

    Args:
        target: what to run.
        seed: of all choices; with a number of ``executions`` the whole run repeats exactly.
        executions: how many; None for no limit.
        seconds: how long; None for no limit.
        corpus: inputs to begin with besides the target's own.
        before: is given each input before it is run, to keep it should the process die.
        tell: is given what was found so far, each time an input reached something new.
    """
    choose, found, start = random.Random(seed), Found(), time.monotonic()
    todo = [*target.seeds(), *(corpus or [])]
    while found.executions != executions and (seconds is None or found.seconds < seconds):
        first = found.executions < len(todo)
        data = todo[found.executions] if first else target.mutate(_pick(found, choose) or todo[0], choose)
        before(data)
        size = len(found.seen)
        error = fault_of(target, data, found.seen)
        found.executions += 1
        found.seconds = time.monotonic() - start
        if error is not None:
            found.faults.setdefault(place_of(error), (data, error))
        elif first or len(found.seen) > size:
            found.kept.append(data)
            tell(found)
    return found


def _pick(found: Found, choose: random.Random) -> bytes | None:
    """One of the inputs kept, later ones more often."""
    count = len(found.kept)
    return found.kept[max(choose.randrange(count), choose.randrange(count))] if count else None
