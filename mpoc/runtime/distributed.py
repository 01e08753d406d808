"""The process group: which process this is, and how processes share work and fail together.

torchrun starts the processes, on one machine or on several that see the same files, and names them in the
environment; they communicate through gloo on the CPU.  An error in one process ends all: the main process
reports it, the others exit silently.  torch is imported only where processes communicate.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn, TypeVar, cast

from mpoc.errors import MpocError

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_Other = TypeVar("_Other")
_Key = TypeVar("_Key", bound=Hashable)
_FEWEST = 2  # batches of a shard, where there are so many: sums of shards are added up one by one
_MOST = 8  # shards of a pass: more processes than that cannot share it
# A process may wait while another fits its longest layer; torchrun ends all when one dies.
_PATIENCE = timedelta(days=7)
_AT_ONCE = 8  # items, whatever a processor has: each has memory of its own
_LOOKS_FOR_SIGNALS, _WAITS_FOR_THREADS = 0.2, 1.0  # seconds, between two looks and after a signal


def num_processes() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


_ends_at_once = threading.Event()


def note_gloo_used() -> None:
    """Note that this process communicates through gloo, for :func:`exit_process`."""
    _ends_at_once.set()


def exit_process(status: int) -> NoReturn:
    """End this process.

    A process that has used gloo exits without finalising the interpreter: now and then a gloo thread outlives
    its group and ends a process whose work is done with SIGABRT (pytorch issue 190489).  So does one whose
    threads are still at work, for which the interpreter would wait.
    """
    if _ends_at_once.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_main() -> bool:
    """Whether this process is the one that prints and writes, as the environment says."""
    return rank() == 0


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as seen by the one with this rank; ``ProcessGroup()`` is a single process."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and puts the output in place."""
        return self.rank == 0

    def broadcast(self, value: _Value | None, src: int = 0) -> _Value:
        """The value that process ``src`` has, in all processes; picklable, its tensors on the CPU."""
        if self.size > 1:
            import torch.distributed as dist

            box = [value if self.rank == src else None]
            with self._talking():
                dist.broadcast_object_list(box, src=src)
            value = box[0]
        return cast(_Value, value)

    def _send_to_main(self, value: _Value | None, src: int) -> _Value | None:
        """The value that process ``src`` has, in the main process; None in others."""
        if src != 0 and self.rank in (0, src):
            import torch.distributed as dist

            box = [value]
            with self._talking():
                if self.is_main:
                    dist.recv_object_list(box, src=src)
                else:
                    dist.send_object_list(box, dst=0)
            value = box[0]
        return value if self.is_main else None

    def _all_gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in all processes; picklable."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], _Value]) -> _Value:
        """Run ``work`` in the main process and broadcast its result."""
        result = None
        with self.all_or_raise():
            if self.is_main:
                result = work()
        return self.broadcast(result)

    def map(
        self,
        items: Sequence[_Item],
        work: Callable[[_Item], _Value],
        costs: Sequence[float] | None = None,
        is_small: Callable[[_Item], bool] | None = None,
    ) -> list[_Value]:
        """Share ``work`` on each item out among the processes; all get all results, in order.

        Args:
            items: the same in all processes.
            work: runs in one process for each item; its result is picklable, with tensors on the CPU.
            costs: relative cost of each item; None: all equal.
            is_small: of which items a process works on several at a time, each on one thread; None: of none.
        """
        own, owners = self._run_share(items, work, costs, is_small)
        return [self.broadcast(own.pop(k, None), src=owner) for k, owner in enumerate(owners)]

    def parallel(self, longer: Callable[[], _Value], shorter: Callable[[], _Other]) -> tuple[_Value, _Other]:
        """Run two functions, in two processes if there are several; the first is the longer one."""
        works: list[Callable[[], Any]] = [longer, shorter]
        first, second = self.map(works, lambda work: work(), (2.0, 1.0))
        return first, second

    def map_to_main(
        self,
        items: Sequence[_Item],
        work: Callable[[_Item], _Value],
        costs: Sequence[float] | None = None,
        is_small: Callable[[_Item], bool] | None = None,
    ) -> Iterator[_Value | None]:
        """Like :meth:`map`, but the main process gets the results, one at a time, and others get None."""
        own, owners = self._run_share(items, work, costs, is_small)
        for k, owner in enumerate(owners):
            yield self._send_to_main(own.pop(k, None), src=owner)

    def _run_share(
        self,
        items: Sequence[_Item],
        work: Callable[[_Item], _Value],
        costs: Sequence[float] | None,
        is_small: Callable[[_Item], bool] | None,
    ) -> tuple[dict[int, _Value], list[int]]:
        """The results of this process by index, and the rank that has each result."""
        owners = self.assigned_ranks([1.0] * len(items) if costs is None else costs)
        mine = [k for k, owner in enumerate(owners) if owner == self.rank]
        with self.all_or_raise():
            small = [k for k in mine if is_small is not None and is_small(items[k])]
            own = dict(zip(small, map_in_threads([items[k] for k in small], work), strict=True))
            own |= {k: work(items[k]) for k in mine if k not in own}
        return own, owners

    def raise_any(self, error: Exception | None) -> None:
        """Wait for all processes and raise if one of them has an error.

        Raises:
            Exception: in the main process, its own error.
            MpocError, OSError: in the main process, the error of another.
            SystemExit: in other processes.
        """
        errors = [error] if self.size == 1 else self._all_gather(None if error is None else _portable(error))
        first = next((failed for failed in errors if failed is not None), None)
        if first is None:
            return
        if not self.is_main:
            raise SystemExit(getattr(first, "exit_code", 1))
        raise first if error is None else error

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn gloo's error when another process is gone; torchrun says which one, and ends the rest."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_main:
                raise SystemExit(1) from error
            raise MpocError("another process ended before the work was done") from error

    @contextmanager
    def all_or_raise(self) -> Iterator[None]:
        """A block that each process runs by itself; all leave it together, or raise if one fails.

        Raises:
            Exception: as :meth:`raise_any`.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.raise_any(failed)

    def own_indices(self, costs: Sequence[float]) -> list[int]:
        """The indices of the items that are assigned to this process."""
        return [number for number, owner in enumerate(self.assigned_ranks(costs)) if owner == self.rank]

    def assigned_ranks(self, costs: Sequence[float]) -> list[int]:
        """The rank for each item: the costliest first, each to the process with the least cost so far."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
            least = min(range(self.size), key=loads.__getitem__)
            loads[least] += costs[number]
            owners[number] = least
        return owners


SINGLE_PROCESS = ProcessGroup()


def map_in_threads(items: Sequence[_Item], work: Callable[[_Item], _Value]) -> list[_Value]:
    """``work`` on each item, in order, several at a time, each on one thread of the processor.

    The first error ends it once the items at hand are done.  A signal ends it at once; items at hand then end
    with the process, if not before.

    Args:
        items: that take a few seconds each.
        work: computes on one thread wherever it runs, so that it always gives the same.
    """
    import torch

    before = torch.get_num_threads()
    workers = min(_AT_ONCE, len(items), before)
    if workers < 2:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    begun: list[Future[_Value]] = []
    try:
        for item in items:
            begun.append(pool.submit(work, item))
        left: Collection[Future[_Value]] = begun
        while left:  # again and again, since a signal that reaches another thread does not end the wait
            done, left = wait(left, _LOOKS_FOR_SIGNALS, return_when=FIRST_EXCEPTION)
            left = () if any(one.exception() for one in done) else left
        results = [one.result() for one in begun if one.done()]
    except (KeyboardInterrupt, SystemExit):
        _ends_at_once.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(begun, timeout=_WAITS_FOR_THREADS)
        raise
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)  # also that of threads to come, which each thread's setting changes
    pool.shutdown()
    return results


def _portable(error: Exception) -> Exception:
    """An error that can be sent to other processes."""
    if isinstance(error, MpocError | OSError):
        return error
    import socket

    return MpocError(f"{socket.gethostname()}: {error!r}")


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that the environment names; a single one without torchrun."""
    if num_processes() == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise MpocError("this torch has no torch.distributed, which several processes need")
    note_gloo_used()
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield ProcessGroup(rank(), num_processes())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class BatchShards:
    """The shards of ``count`` batches, and the processes that share them.

    Each shard is summed by itself, and the sums are merged in order, whichever process makes them.  Several
    processes thus find what one alone finds, to the last bit.
    """

    count: int
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def every(self) -> list[range]:
        """The batches of each shard; the shards do not depend on the number of processes."""
        parts = max(1, min(_MOST, self.count // _FEWEST))
        return [range(*ends) for ends in pairwise(k * self.count // parts for k in range(parts + 1))]

    @property
    def mine(self) -> list[int]:
        """The batches that this process runs."""
        return [index for part in self.every[self.group.rank :: self.group.size] for index in part]

    def total(
        self, measure: Callable[[range], dict[_Key, _Value]], merge: Callable[[_Value, _Value], _Value]
    ) -> dict[_Key, _Value]:
        """Accumulate sums over all batches, the same in all processes.

        Args:
            measure: gives the sums over the batches of one shard, on the CPU.
            merge: joins a sum over earlier batches and one over later ones.
        """
        total: dict[_Key, _Value] = {}
        for first in range(0, len(self.every), self.group.size):
            parts = self.every[first : first + self.group.size]
            own: dict[_Key, _Value] = {}
            with self.group.all_or_raise():
                if self.group.rank < len(parts):
                    own = measure(parts[self.group.rank])
            for owner in range(len(parts)):
                for key in self.group.broadcast(list(own), src=owner):
                    given = self.group.broadcast(
                        own.pop(key) if owner == self.group.rank else None, src=owner
                    )
                    total[key] = merge(total[key], given) if key in total else given
        return total
