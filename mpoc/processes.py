"""Which of several processes this is, as torchrun and accelerate launch say it.  No torch here."""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many work together; 1 without such a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"
