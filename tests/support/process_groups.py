"""Several threads that work as the processes of a :class:`mpoc.runtime.distributed.ProcessGroup`; they share
their memory.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mpoc.runtime.distributed import ProcessGroup

_Value = TypeVar("_Value")


@dataclass
class _Table:
    """Where they put what they say."""

    barrier: threading.Barrier
    said: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Threads(ProcessGroup):
    """One of them."""

    table: _Table | None = None

    def _all_gather(self, value: Any) -> list[Any]:
        assert self.table is not None
        self.table.said[self.rank] = pickle.dumps(value)
        self.table.barrier.wait(60)
        found = [pickle.loads(said) for said in self.table.said]
        self.table.barrier.wait(60)
        return found

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return self._all_gather(value)[src]

    def _send_to_main(self, value: Any, src: int) -> Any:
        found = self._all_gather(value)[src]
        return found if self.is_main else None


def in_threads(size: int, work: Callable[[ProcessGroup], _Value]) -> list[_Value]:
    """What each of ``size`` processes returns."""
    table = _Table(threading.Barrier(size), [None] * size)
    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(work, Threads(rank, size, table)) for rank in range(size)]
        return [one.result() for one in running]
