"""Sets that are arrays already: held in memory, or mapped from their files where they are large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.data.labels import Column, Where, number_labels
from mpoc.errors import MpocError

_ROWS_AT_ONCE = 1 << 24  # entries looked at together when a mapped array is searched for NaN


@dataclass(frozen=True)
class Part:
    """The examples of one file (or of one pair of files)."""

    name: str  # the file, for messages
    x: Tensor  # (n, …), in memory or mapped
    y: Column | None  # (n,) or (n, …)
    x_name: str = "x"  # the array in the file, for messages
    y_file: str = ""  # where labels lie in a file of their own


class Arrays(Examples):
    """Examples in one tensor, or in several that are mapped from files."""

    def __init__(self, parts: list[Tensor], y: Tensor | None) -> None:
        self.parts = parts  # each (n_k, …) of one dtype and shape
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.y = y

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``x`` as stored, and ``y``: one index where there is one tensor."""
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
    """A checked data set from the arrays of each split.

    uint8 arrays (n, H, W), (n, C, H, W) and (n, H, W, C) are images, and come out as (n, C, H, W).

    Raises:
        MpocError: counts of x and y that differ, shapes that differ, no examples, NaN, a bad label.
    """
    kind = "images" if _are_images(parts) else "arrays"
    splits = {split: [_channels_first(part) if kind == "images" else part for part in held]
              for split, held in parts.items()}  # fmt: skip
    everything = [part for held in splits.values() for part in held]
    for part in everything:
        _check(part, everything[0])
    columns = {split: _column(held) for split, held in splits.items() if held[0].y is not None}
    labels, classes, notes = number_labels(columns, names)
    total = sum(part.x.nbytes for part in everything)
    examples: dict[str, Examples] = {}
    for split, held in splits.items():
        tensors = [part.x for part in held]
        if total <= source.limit:
            tensors = [torch.cat(tensors).contiguous()]  # cat copies one tensor too: no mapping is left
        examples[split] = Arrays(tensors, labels.get(split))
    shape = tuple(everything[0].x.shape[1:])
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
    if len(part.x) == 0:
        raise MpocError(f"{part.name}: {part.x_name} has no examples")
    if part.y is not None and len(part.x) != len(part.y):
        raise MpocError(
            f"{part.name}: {len(part.x):,} examples in {part.x_name} but {len(part.y):,} labels",
            "the two must be written together, one label an example",
        )
    if part.x.shape[1:] != first.x.shape[1:] or part.x.dtype != first.x.dtype:
        raise MpocError(
            f"{part.name}: examples of shape {tuple(part.x.shape[1:])} ({part.x.dtype}), "
            f"but {first.name} has {tuple(first.x.shape[1:])} ({first.x.dtype})"
        )
    if (part.y is None) != (first.y is None):
        raise MpocError(f"{(part if part.y is None else first).name}: no labels, but other files have them")
    if part.x.is_floating_point():
        _check_finite(part)


def _check_finite(part: Part) -> None:
    """Look at every entry, some rows at a time, so that a mapped array need not fit in memory."""
    step = max(1, _ROWS_AT_ONCE // max(1, part.x[0].numel()))
    for start in range(0, len(part.x), step):
        rows = part.x[start : start + step].reshape(len(part.x[start : start + step]), -1)
        bad = torch.nonzero(~torch.isfinite(rows).all(dim=1)).flatten()
        if len(bad):
            row = int(bad[0])
            what = "NaN" if bool(rows[row].isnan().any()) else "infinity"
            raise MpocError(f"{part.name}: {what} in {part.x_name}, row {start + row}")


def _column(held: list[Part]) -> tuple[Column, Where]:
    """The labels of all files of a split, and which file and row each came from."""
    columns = [part.y for part in held if part.y is not None]
    if len({(column.dtype.kind, column.shape[1:]) for column in columns}) > 1:
        raise MpocError(f"{held[0].name}: labels of another type or shape than in {held[-1].name}")
    starts = np.cumsum([0, *(len(column) for column in columns)])

    def where(row: int) -> str:
        k = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{held[k].y_file or held[k].name}, row {row - int(starts[k])}"

    return np.concatenate(columns), where
