"""The next tensor is brought into memory while the present one is worked on.

Checkpoints are memory-mapped: a tensor's bytes come from disk, or over a network, when they are first looked
at.  A thread of its own looks at them beforehand; what it brings in are pages of files, which the system
drops where memory is short.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import torch

from mpoc.checkpoint import Checkpoint

_PAGE = 4096
_PIECE = 1 << 24  # bytes looked at in one step


def one_ahead(checkpoint: Checkpoint, names: Iterable[str]) -> Generator[str, None, None]:
    """These names; while one is worked on, the tensor of the next is brought into memory.

    Args:
        checkpoint: that holds them.
        names: in the order in which they will be read.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        for name, following in pairwise(chain(names, [None])):
            if following is not None:
                thread.submit(look_at, checkpoint, following)  # its reader is told of an error
            assert name is not None
            yield name


def look_at(checkpoint: Checkpoint, name: str) -> None:
    """At a byte of every page of a tensor; numpy lets other threads run."""
    tensor = checkpoint.read(name)
    if tensor.is_contiguous():
        for piece in tensor.detach().view(-1).view(torch.uint8).split(_PIECE):
            piece.numpy()[::_PAGE].sum()
