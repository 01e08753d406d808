"""Several threads that work as the processes of a :class:`mpoc.team.Team`; they share their memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mpoc.errors import MpocError
from mpoc.team import Team

_Value = TypeVar("_Value")


@dataclass
class _Table:
    """Where they put what they say."""

    barrier: threading.Barrier
    said: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Threads(Team):
    """One of them."""

    table: _Table | None = None

    def _all_say(self, value: Any) -> list[Any]:
        assert self.table is not None
        self.table.said[self.rank] = value
        self.table.barrier.wait(60)
        found = list(self.table.said)
        self.table.barrier.wait(60)
        return found

    def told(self, value: Any, by: int = 0) -> Any:
        return self._all_say(value)[by]

    def agree(self, error: Exception | None) -> None:
        first = next((one for one in self._all_say(error) if one is not None), None)
        if first is not None:
            raise MpocError(str(first)) if self.is_first else SystemExit(1)


def in_threads(size: int, work: Callable[[Team], _Value]) -> list[_Value]:
    """What each of ``size`` mates finds."""
    table = _Table(threading.Barrier(size), [None] * size)
    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(work, Threads(rank, size, table)) for rank in range(size)]
        return [one.result() for one in running]
