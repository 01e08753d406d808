"""No file that a training reads, and no other that it writes, is replaced, ``--force`` or not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mpoc.data.files import is_data
from mpoc.errors import UsageError
from mpoc.train.material import DataOptions


def refuse_collisions(written: Iterable[Path], read: Iterable[Path], data: DataOptions) -> None:
    """Check the names of all files before any work.

    Args:
        written: files and directories.
        read: files and directories.
        data: the set, which is read too; other files may be written into its folder.

    Raises:
        UsageError: one would be written over.
    """
    inputs = {path.resolve() for path in (*read, data.path)}
    taken: set[Path] = set()
    for file in written:
        target = file.resolve()
        if target in inputs or (file.exists() and is_data(file, data.path, data.format)):
            raise UsageError(f"{file}: would write over or into an input", "choose another name")
        if target in taken:
            raise UsageError(f"{file}: written twice", "choose another name")
        taken.add(target)
