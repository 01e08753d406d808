"""Labels and targets: numbered, named and checked before any training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.errors import MpocError

# Integer labels above this are taken for a mistake (identifiers, hashes), not for classes.
MOST_CLASSES = 1_000_000

Column = NDArray[np.generic]  # (n,) or (n, …): integers, floats or strings
Where = Callable[[int], str]  # the file and row of an example, for messages


def number_labels(
    columns: dict[str, tuple[Column, Where]], names: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """Number and check the labels or targets of every split.

    Args:
        columns: split → its values: integers (n,) or (n, 1) or strings (n,) are labels, floats (n, …) are
            regression targets.
        names: of the classes, where the files tell.

    Returns:
        split → (n,) int64 labels or (n, …) float32 targets; class names, () for targets; notes for the user.

    Raises:
        MpocError: a label that is negative, missing or without a name, or a target that is not finite.
    """
    kinds = {_kind(column, where) for column, where in columns.values()}
    if len(kinds) > 1:
        raise MpocError(f"labels of different kinds in the splits: {', '.join(sorted(kinds))}")
    if kinds == {"targets"}:
        return {split: _targets(*pair) for split, pair in columns.items()}, (), []
    if kinds == {"strings"}:
        return _number_strings(columns, names)
    labels = {split: _integers(*pair, len(names)) for split, pair in columns.items()}
    count = len(names) or 1 + max((int(y.max()) for y in labels.values()), default=-1)
    names = names or tuple(map(str, range(count)))
    return labels, names, _gaps(labels, names)


def _kind(column: Column, where: Where) -> str:
    if column.dtype.kind == "f":
        return "targets"
    if column.dtype.kind in "US":
        return "strings"
    if column.dtype.kind in "iub":
        return "integers"
    raise MpocError(f"{where(0)}: labels of type {column.dtype}; integers, floats or strings were expected")


def _targets(column: Column, where: Where) -> Tensor:
    rows = column.reshape(len(column), -1)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise MpocError(f"{where(int(bad[0]))}: the target is not finite ({len(bad):,} such rows)")
    return torch.from_numpy(column.astype(np.float32))


def _integers(column: Column, where: Where, known: int) -> Tensor:
    """(n,) int64: every label in [0, known), or at least 0 where ``known`` is 0."""
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if column.ndim != 1:
        raise MpocError(
            f"{where(0)}: integer labels of shape {column.shape}; one label an example was expected",
            "store regression targets as floats",
        )
    top = known or MOST_CLASSES
    numbers = column.astype(np.int64)
    bad = np.flatnonzero((numbers < 0) | (numbers >= top))
    if len(bad):
        row, label = int(bad[0]), int(numbers[bad[0]])
        hint = "labels count from 0; omit the labels of a split that has none" if label < 0 else None
        reason = "is negative" if label < 0 else f"is out of range: there are {top:,} classes, from 0"
        if label >= 0 and not known:
            reason, hint = f"is above {top:,}", "store regression targets as floats"
        more = f" ({len(bad):,} such rows)" if len(bad) > 1 else ""
        raise MpocError(f"{where(row)}: label {label} {reason}{more}", hint)
    return torch.from_numpy(numbers)


def _number_strings(
    columns: dict[str, tuple[Column, Where]], names: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """Classes in the order of their names, those of the training split where there is one."""
    if not names:
        column = (columns.get("train") or next(iter(columns.values())))[0]
        names = tuple(str(name) for name in np.unique(column))
    labels = {}
    for split, (column, where) in columns.items():
        numbers = {name: index for index, name in enumerate(names)}
        labels[split] = torch.tensor([numbers.get(str(name), -1) for name in column], dtype=torch.int64)
        unknown = torch.nonzero(labels[split] < 0).flatten().tolist()
        if unknown:
            raise MpocError(
                f"{where(unknown[0])}: label {str(column[unknown[0]])!r} is not a class of the set"
            )
    return labels, names, _gaps(labels, names)


def _gaps(labels: dict[str, Tensor], names: tuple[str, ...]) -> list[str]:
    """A note for each split that lacks examples of a class, which skews the accuracy of an evaluation."""
    notes = []
    for split, y in labels.items():
        counts = torch.bincount(y, minlength=len(names))
        absent = torch.nonzero(counts == 0).flatten().tolist()
        if absent:
            shown = ", ".join(names[index] for index in absent[:5]) + (", …" if len(absent) > 5 else "")
            notes.append(f"{split}: no example of {len(absent)} of {len(names)} classes ({shown})")
    return notes
