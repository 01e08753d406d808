"""A validation split for a set that brings none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpoc.data.base import Data, Examples, Subset
from mpoc.data.stream import TokenStream
from mpoc.errors import MpocError


def hold_out(data: Data, share: float, seed: int) -> Data:
    """The same set with a share of ``train`` as ``validation``; ``notes`` says so.

    Where examples have labels every class gives its share, to within one example.  Of a token stream the
    end is taken, since random windows of what is left must not overlap it.

    Args:
        data: a set with a training split and no validation split.
        share: between 0 and 1.
        seed: of the choice; the same seed chooses the same examples.

    Raises:
        MpocError: no training split, a validation split already, or nothing left on one side.
    """
    if "train" not in data.splits or "validation" in data.splits:
        had = ", ".join(data.splits)
        raise MpocError(f"{data.path}: nothing to hold out: it has the splits {had}")
    train = data.splits["train"]
    kept: Examples
    held: Examples
    said = f"no validation split: {share:.3g} of train held out"
    if isinstance(train, TokenStream):
        kept, held = train.cut(share) if 0 < share < 1 else (train, train.cut(0)[1])
        said += ", its end"
    else:
        labelled = train.y is not None and train.y.dtype == torch.int64
        classes = train.y if train.y is not None and labelled else torch.zeros(len(train), dtype=torch.int64)
        chosen = _choose(classes, share, seed)
        kept, held = (
            Subset(train, torch.nonzero(~chosen).flatten()),
            Subset(train, torch.nonzero(chosen).flatten()),
        )
        said += f" (seed {seed}{', by class' if labelled else ''})"
    if len(kept) == 0 or len(held) == 0:
        hint = "choose a shorter block, or bring more text" if isinstance(train, TokenStream) else None
        raise MpocError(
            f"{data.path}: {share:.3g} of {len(train):,} training examples leaves a split empty", hint
        )
    splits = {"train": kept, "validation": held, **{k: v for k, v in data.splits.items() if k != "train"}}
    return replace(data, splits=splits, notes=(*data.notes, said))


def _choose(classes: Tensor, share: float, seed: int) -> Tensor:
    """(n,) bool: round(n · share) examples, of class c its share to within one; one at least is left."""
    if not 0 < share < 1:
        return torch.zeros(len(classes), dtype=torch.bool)
    counts = torch.bincount(classes)
    exact = counts.double() * share
    quota = exact.floor().long()
    missing = round(len(classes) * share) - int(quota.sum())
    largest = torch.argsort(exact - quota, descending=True, stable=True)
    quota[largest[: max(missing, 0)]] += 1
    quota = torch.minimum(quota, (counts - 1).clamp(min=0))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(classes[order], stable=True)]
    rank = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[by_class]]
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    chosen[by_class] = rank < quota[classes[by_class]]
    return chosen
