"""Which of several processes this is, as torchrun and accelerate launch say it.  No torch here."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn


def num_processes() -> int:
    """How many work together; 1 without such a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this one on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


_talked = threading.Event()


def note_talk() -> None:
    """This process talks to others through gloo."""
    _talked.set()


def end(status: int) -> NoReturn:
    """End this process.

    One that has talked through gloo ends without finalising: now and then a thread of gloo's outlives its
    group until then, and takes a process whose work is done down with SIGABRT (pytorch issue 190489).
    """
    if _talked.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0
