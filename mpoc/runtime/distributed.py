"""Which of several processes this is, as torchrun and accelerate launch say it.  No torch here.

Several processes that work as one: who they are, what one tells all, and an error of one that ends all.

torchrun starts them, on one machine or on several that see the same files; they talk through gloo.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

from mpoc.errors import MpocError

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_Other = TypeVar("_Other")
# A process may wait for another's longest layer; torchrun ends all where one dies.
_PATIENCE = timedelta(days=7)


def num_processes() -> int:
    """How many work together; 1 without such a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this one on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


_gloo_used = threading.Event()


def note_gloo_used() -> None:
    """This process talks to others through gloo."""
    _gloo_used.set()


def exit_process(status: int) -> NoReturn:
    """End this process.

    One that has talked through gloo ends without finalising: now and then a thread of gloo's outlives its
    group until then, and takes a process whose work is done down with SIGABRT (pytorch issue 190489).
    """
    if _gloo_used.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


@dataclass(frozen=True)
class ProcessGroup:
    """This process among ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it prints, and puts the output in place."""
        return self.rank == 0

    def broadcast(self, value: _Value | None, src: int = 0) -> _Value:
        """What one process has, in all; tensors in it are on the CPU."""
        if self.size > 1:
            import torch.distributed as dist

            box = [value if self.rank == src else None]
            with self._talking():
                dist.broadcast_object_list(box, src=src)
            value = box[0]
        return cast(_Value, value)

    def _send_to_main(self, value: _Value | None, src: int) -> _Value | None:
        """What one process has, in the first; nothing in others."""
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
        """What each process has, in all; picklable."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, value)
        return found

    def on_main(self, work: Callable[[], _Value]) -> _Value:
        """What the first process finds, in all."""
        found = None
        with self.all_or_raise():
            if self.is_main:
                found = work()
        return self.broadcast(found)

    def map(
        self, items: Sequence[_Item], work: Callable[[_Item], _Value], costs: Sequence[float] | None = None
    ) -> list[_Value]:
        """What ``work`` makes of each, in all processes; they share the work.

        Args:
            items: the same in all.
            work: is done by one process alone.  What it gives has its tensors on the CPU.
            costs: of the items; None: they are alike.
        """
        own, owners = self._done(items, work, costs)
        return [self.broadcast(own.pop(k, None), src=owner) for k, owner in enumerate(owners)]

    def parallel(self, one: Callable[[], _Value], other: Callable[[], _Other]) -> tuple[_Value, _Other]:
        """Two pieces of work, by two processes where there are; the longer is the first."""
        works: list[Callable[[], Any]] = [one, other]
        first, second = self.map(works, lambda work: work(), (2.0, 1.0))
        return first, second

    def map_to_main(
        self, items: Sequence[_Item], work: Callable[[_Item], _Value], costs: Sequence[float] | None = None
    ) -> Iterator[_Value | None]:
        """As :meth:`map`, one after another, for the first process; nothing for the others."""
        own, owners = self._done(items, work, costs)
        for k, owner in enumerate(owners):
            yield self._send_to_main(own.pop(k, None), src=owner)

    def _done(
        self, items: Sequence[_Item], work: Callable[[_Item], _Value], costs: Sequence[float] | None
    ) -> tuple[dict[int, _Value], list[int]]:
        """This process's share by number, and whose each is."""
        owners = self.assigned_ranks([1.0] * len(items) if costs is None else costs)
        with self.all_or_raise():
            own = {k: work(items[k]) for k, owner in enumerate(owners) if owner == self.rank}
        return own, owners

    def raise_any(self, error: Exception | None) -> None:
        """Wait for all; where one failed, all end: the first process with its message, the others silently.

        Raises:
            Exception: the error itself, with one process; its own, of the first.
            MpocError, OSError: an error of another.
            SystemExit: in the others.
        """
        found = [error] if self.size == 1 else self._all_gather(None if error is None else _as_ours(error))
        first = next((one for one in found if one is not None), None)
        if first is None:
            return
        if not self.is_main:
            raise SystemExit(getattr(first, "exit_code", 1))
        raise first if error is None else error

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """gloo raises where another process is gone; torchrun says which one, and ends the others."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_main:
                raise SystemExit(1) from error
            raise MpocError("another of the processes has ended before the work was done") from error

    @contextmanager
    def all_or_raise(self) -> Iterator[None]:
        """What each process does by itself; they go on when all are done.

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
        """Which pieces of work are this process's."""
        return [number for number, owner in enumerate(self.assigned_ranks(costs)) if owner == self.rank]

    def assigned_ranks(self, costs: Sequence[float]) -> list[int]:
        """Whose each piece of work is: the largest first, always to whoever has least."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
            least = min(range(self.size), key=loads.__getitem__)
            loads[least] += costs[number]
            owners[number] = least
        return owners


SINGLE_PROCESS = ProcessGroup()


def _as_ours(error: Exception) -> Exception:
    """One that other processes can be sent."""
    if isinstance(error, MpocError | OSError):
        return error
    return MpocError(f"{socket.gethostname()}: {error!r}")


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that the environment names; one alone without torchrun."""
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
