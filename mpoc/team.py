"""Several processes that work as one: who they are, what one tells all, and an error of one that ends all.

torchrun starts them, on one machine or on several that see the same files; they talk through gloo.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from mpoc.errors import MpocError
from mpoc.processes import num_processes, rank

_Value = TypeVar("_Value")
# A process may wait for another's longest layer; torchrun ends all where one dies.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """This process among ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it prints, and puts the output in place."""
        return self.rank == 0

    def told(self, value: _Value) -> _Value:
        """What the first process has, in all."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Wait for all; where one failed, all end: the first process with its message, the others silently.

        Raises:
            Exception: the error itself, with one process.
            MpocError: an error, of whichever process has one.
            SystemExit: in the others.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        import torch.distributed as dist

        found: list[MpocError | None] = [None] * self.size
        dist.all_gather_object(found, None if error is None else _as_ours(error))
        first = next((one for one in found if one is not None), None)
        if first is not None and self.is_first:
            raise first from error
        if first is not None:
            raise SystemExit(first.exit_code)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each process does by itself; they go on when all are done.

        Raises:
            Exception: as :meth:`agree`.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.agree(failed)

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which pieces of work are this process's: the largest first, always to whoever has least."""
        loads, mine = [0.0] * self.size, []
        for number in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
            least = min(range(self.size), key=loads.__getitem__)
            loads[least] += costs[number]
            if least == self.rank:
                mine.append(number)
        return sorted(mine)


def _as_ours(error: Exception) -> MpocError:
    if isinstance(error, MpocError):
        return error
    text = f"{getattr(error, 'filename', None) or socket.gethostname()}: {error!r}"
    return MpocError(text)


@contextmanager
def team() -> Iterator[Team]:
    """The processes that the environment names; one alone without torchrun."""
    if num_processes() == 1:
        yield Team()
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise MpocError("this torch has no torch.distributed, which several processes need")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Team(rank(), num_processes())
    finally:
        dist.destroy_process_group()
