"""Whether what is about to be made has room: a small file can describe a matrix of any size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mpoc.errors import MpocError
from mpoc.report import human_bytes


def refuse_more_than_memory(path: Path, name: str, nbytes: int) -> None:
    """Check before a tensor is made.

    Args:
        path: of the file that describes it, for the message.
        name: of the tensor.
        nbytes: that it takes in memory.

    Raises:
        MpocError: the machine has less memory in all.
    """
    memory = _memory()
    if memory is not None and nbytes > memory:
        raise MpocError(
            f"{path}: tensor {name!r} takes {human_bytes(nbytes)} when it is dense, "
            f"and this machine has {human_bytes(memory)} of memory",
            "load it with mpoc.load, which computes with its cores",
        )


def refuse_more_than_disk(output: Path, nbytes: int) -> None:
    """Check before a file is written.

    Raises:
        MpocError: its disk has less room.
    """
    free = shutil.disk_usage(output.resolve().parent).free
    if nbytes > free:
        raise MpocError(
            f"{output}: would take {human_bytes(nbytes)}, and its disk has {human_bytes(free)} left",
            "make room, or write elsewhere with -o",
        )


def _memory() -> int | None:
    """Bytes of the whole machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
