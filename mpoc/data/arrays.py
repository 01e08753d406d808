"""Data sets of arrays, in memory or mapped from large files; labels and targets, numbered and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.errors import MpocError

# Integer labels above this are taken for a mistake (identifiers, hashes), not for classes.
MOST_CLASSES = 1_000_000

Column = NDArray[np.generic]  # (n,) or (n, …): integers, floats or strings
Where = Callable[[int], str]  # the file and row of an example, for messages
_ENTRIES_AT_ONCE = 1 << 24  # read together when a mapped array is searched for NaN


@dataclass(frozen=True)
class Part:
    """The examples of one file (or of one pair of files)."""

    name: str  # the file, for messages
    x: Tensor  # (n, …), in memory or mapped
    y: Column | None  # (n,) or (n, …)
    x_name: str = "x"  # the array in the file, for messages
    y_file: str = ""  # the file of the labels, where it is another
    mask: Tensor | None = None  # (n, T), the attention mask of token ids
    is_tokens: bool = False  # x is token ids (n, T)


class Arrays(Examples):
    """Examples in one tensor, or in several that are mapped from files."""

    def __init__(self, parts: list[Tensor], y: Tensor | None) -> None:
        self.parts = parts  # each (n_k, …) of one dtype and shape
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.y = y

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``x`` as stored, (n, …), and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(self.parts) == 1:
            x = self.parts[0][chosen]
        else:
            first = self.parts[0]
            x = torch.empty((len(chosen), *first.shape[1:]), dtype=first.dtype)
            owner = torch.bucketize(chosen, self.starts[1:], right=True)
            for k in owner.unique().tolist():
                x[owner == k] = self.parts[k][chosen[owner == k] - self.starts[k]]
        return {"x": x} if self.y is None else {"x": x, "y": self.y[chosen]}


def assemble(
    source: DataSource, form: str, parts: dict[str, list[Part]], names: tuple[str, ...] = ()
) -> Data:
    """A checked data set of the arrays of each split.

    uint8 arrays (n, H, W), (n, C, H, W) and (n, H, W, C) are images, and come out as (n, C, H, W).

    Raises:
        MpocError: counts of x and y that differ, shapes that differ, no examples, NaN, a bad label.
    """
    kind = "images" if _are_images(parts) else "arrays"
    if kind == "images":
        parts = {split: list(map(_channels_first, held)) for split, held in parts.items()}
    all_parts = [part for held in parts.values() for part in held]
    for part in all_parts:
        _check(part, all_parts[0])
    labels, classes, notes = number_labels(label_columns(parts), names)
    total = sum(part.x.nbytes for part in all_parts)
    examples: dict[str, Examples] = {}
    for split, held in parts.items():
        tensors = [part.x for part in held]
        if total <= source.limit:
            tensors = [torch.cat(tensors).contiguous()]  # cat copies one tensor too: no mapping is left
        examples[split] = Arrays(tensors, labels.get(split))
    shape = tuple(all_parts[0].x.shape[1:])
    return Data(source.path, form, kind, examples, classes, shape, (*source.notes, *notes))


def _are_images(parts: dict[str, list[Part]]) -> bool:
    first = next(iter(parts.values()))[0].x
    channels = {1, 3, 4} & {first.shape[1], first.shape[-1]} if first.ndim == 4 else {1}
    return first.dtype == torch.uint8 and first.ndim in (3, 4) and bool(channels)


def _channels_first(part: Part) -> Part:
    x = part.x
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.permute(0, 3, 1, 2)
    return replace(part, x=x)


def _check(part: Part, first: Part) -> None:
    """Check a part by itself and against the first one of the data set."""
    check_counts(part)
    if part.x.shape[1:] != first.x.shape[1:] or part.x.dtype != first.x.dtype:
        raise MpocError(
            f"{part.name}: examples of shape {tuple(part.x.shape[1:])} ({part.x.dtype}), "
            f"but {first.name} has {tuple(first.x.shape[1:])} ({first.x.dtype})"
        )
    if (part.y is None) != (first.y is None):
        raise MpocError(f"{(part if part.y is None else first).name}: no labels, but other files have them")
    if part.x.is_floating_point():
        _check_finite(part)


def check_counts(part: Part) -> None:
    """Check that a part has examples, and as many labels.

    Raises:
        MpocError: it has not.
    """
    if len(part.x) == 0:
        raise MpocError(f"{part.name}: {part.x_name} has no examples")
    if part.y is not None and len(part.x) != len(part.y):
        raise MpocError(
            f"{part.name}: {len(part.x):,} examples in {part.x_name} but {len(part.y):,} labels",
            "store one label per example",
        )


def _check_finite(part: Part) -> None:
    """Check every entry, some rows at a time, so that a mapped array need not fit in memory."""
    step = max(1, _ENTRIES_AT_ONCE // max(1, part.x[0].numel()))
    for start in range(0, len(part.x), step):
        rows = part.x[start : start + step].reshape(len(part.x[start : start + step]), -1)
        bad = torch.nonzero(~torch.isfinite(rows).all(dim=1)).flatten()
        if len(bad):
            row = int(bad[0])
            value = "NaN" if bool(rows[row].isnan().any()) else "infinity"
            raise MpocError(f"{part.name}: {value} in {part.x_name}, row {start + row}")


def label_columns(parts: dict[str, list[Part]]) -> dict[str, tuple[Column, Where]]:
    """The labels of each split that has them, and the file and row of each."""
    return {split: _column(held) for split, held in parts.items() if held[0].y is not None}


def _column(held: list[Part]) -> tuple[Column, Where]:
    columns = [part.y for part in held if part.y is not None]
    if len({(column.dtype.kind, column.shape[1:]) for column in columns}) > 1:
        raise MpocError(f"{held[0].name}: labels of another type or shape than in {held[-1].name}")
    return np.concatenate(columns), row_finder(held)


def row_finder(held: list[Part]) -> Where:
    """Names the file and the row in it of a row of a split."""
    starts = np.cumsum([0, *(len(part.x) for part in held)])

    def where(row: int) -> str:
        k = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{held[k].y_file or held[k].name}, row {row - int(starts[k])}"

    return where


def number_labels(
    columns: dict[str, tuple[Column, Where]], names: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """Number and check the labels or targets of every split.

    Args:
        columns: split → its values: integers (n,) or (n, 1) or strings (n,) are labels, floats (n, …) are
            regression targets.
        names: names of the classes, if the files have them.

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
