"""Calibration data: some examples of a data set as batches, and a share of them held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.calibrate.interest import Pooling, read_pooling
from mpoc.data import shuffled
from mpoc.errors import MpocError, UsageError
from mpoc.train.call import Batch, Call
from mpoc.train.feed import Feed
from mpoc.train.material import DataOptions, open_material
from mpoc.train.model import Model
from mpoc.train.settings import derived_seed

TOKENS = 2048  # of a batch of text, padding included
_IMAGES = 64  # of a batch of anything else


@dataclass(frozen=True)
class CalibrationData:
    """What a network is calibrated on; the two parts have no example in common."""

    batches: list[Batch]  # on the CPU
    held_out: list[Batch]  # to choose between fits with
    call: Call  # how the network takes them
    pooling: Pooling | None  # how users read its outputs, where its directory says
    notes: tuple[str, ...]  # what was read and chosen, a line each


def open_calibration(
    options: DataOptions,
    model: Model,
    samples: int,
    held_out: float = 0.125,
    seed: int = 0,
    tokens: int = TOKENS,
) -> CalibrationData:
    """Draw examples of the training split, or of the first there is.

    What a training of the network on this set held out, so that ``mpoc eval`` measures it, is not drawn.

    Args:
        options: which data set.
        model: whose network takes them.
        samples: how many examples; all where there are fewer.
        held_out: share of them, one at least.
        seed: of the draw.
        tokens: of a batch of text at most, padding included, where it is more than one text.

    Raises:
        UsageError: options that do not fit.
        MpocError: bad data, or fewer than two examples.
    """
    if samples < 2 or not 0 < held_out < 1:
        raise UsageError(f"--calibration-samples {samples}: at least 2, one to fit on and one held out")
    material = open_material(options, model, None)
    split = "train" if "train" in material.data.splits else next(iter(material.data.splits))
    feed = material.feed(split)
    if len(feed) < 2:
        raise MpocError(f"{options.path}: {len(feed)} examples in {split}: calibration needs two at least")
    generator = torch.Generator().manual_seed(derived_seed(seed, "calibration"))
    chosen = shuffled(feed.examples, generator)[:samples]
    apart = min(len(chosen) - 1, max(1, round(len(chosen) * held_out)))
    said = (
        f"calibration: {len(chosen):,} of {len(feed):,} examples of {split} (seed {seed}), {apart:,} held out"
    )
    images = material.images
    pixels = f"images: (pixel / 255 − {list(images.mean)}) / {list(images.std)}"
    notes = [material.data.announce(), *material.data.notes]
    notes += [pixels] if material.data.kind == "images" else []
    return CalibrationData(
        _batches(feed, chosen[apart:], tokens), _batches(feed, chosen[:apart], tokens),
        Call.of(model.network),
        read_pooling(model.path) if model.path.is_dir() else None,
        (*notes, said),
    )  # fmt: skip


def _batches(feed: Feed, chosen: Tensor, tokens: int) -> list[Batch]:
    """Texts of about one length together, so that there is little padding."""
    chosen = chosen.sort().values
    lengths = torch.cat([_lengths(feed.read(part)) for part in chosen.split(_IMAGES)])
    if not bool(lengths.any()):
        return [feed.read(part) for part in chosen.split(_IMAGES)]
    order = lengths.argsort(descending=True, stable=True)
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(feed.read(chosen[order[start : start + count]]))
        start += count
    return batches


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each example; 0 where it is no text."""
    if "input_ids" not in batch:
        return torch.zeros(len(next(iter(batch.values()))))
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1)
