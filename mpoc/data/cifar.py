"""CIFAR-10's binary version: rows of 3073 bytes, a label and 32×32 pixels, red plane, green plane, blue.

https://www.cs.toronto.edu/~kriz/cifar.html gives the layout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mpoc.data.arrays import Part, assemble
from mpoc.data.base import Data, Source
from mpoc.data.files import refuse_pickle
from mpoc.errors import MpocError

SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes
_CLASSES = 10


def open_cifar(source: Source) -> Data:
    """``data_batch_1.bin`` … and ``test_batch.bin``; class names from ``batches.meta.txt`` where it is there.

    Raises:
        MpocError: a pickled batch, a file that is not whole rows, a label above 9.
    """
    parts = {split: [_read(file) for file in files] for split, files in source.files.items()}
    first = next(iter(source.files.values()))[0]
    return assemble(source, "cifar-binary", parts, _names(first.with_name("batches.meta.txt")))


def _read(path: Path) -> Part:
    refuse_pickle(path)
    size = path.stat().st_size
    if size == 0 or size % ROW:
        raise MpocError(
            f"{path}: {size:,} bytes are not whole CIFAR-10 rows of {ROW} ({size % ROW} left over)",
            "truncated, or another set: CIFAR-100 has other rows",
        )
    rows = np.memmap(path, np.uint8, mode="c").reshape(-1, ROW)  # copy-on-write: torch wants writable memory
    return Part(str(path), torch.from_numpy(rows[:, 1:].reshape(-1, *SHAPE)), np.array(rows[:, 0]))


def _names(path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text("utf-8").split()) if path.is_file() else ()
    return names if len(names) == _CLASSES else tuple(map(str, range(_CLASSES)))
