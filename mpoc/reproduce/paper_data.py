"""The data of a study: its splits, their preprocessing, and the identity by which results are stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mpoc.data import Data, ImageOptions, TextOptions, check_fits, hold_out, open_data, prepare_images
from mpoc.data.base import Examples, Subset
from mpoc.data.text import TokenStream
from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.models.call import Batch
from mpoc.reproduce.experiment import Training
from mpoc.runtime.device import derived_seed
from mpoc.train.loader import BatchLoader, Transform, plain
from mpoc.train.tasks import CausalLM, Classification, Task

_HELD_OUT = 0.1  # share of the training split, if the data have no split to evaluate on
QUICK_STEPS = 10
_QUICK_MEASURED = 5  # batches


@dataclass(frozen=True)
class PaperData:
    """A data set as one study uses it."""

    data: Data
    task: Task
    images: dict[str, Any]  # mean and standard deviation of the channels; {} for text
    measured: str  # the split whose accuracy is reported
    chooses: bool  # whether a validation split chooses the final weights, not the last step

    def train(self, training: Training) -> BatchLoader:
        """The training split with the training's augmentation."""
        return BatchLoader(self.data.splits["train"], self._transform(training.pad, training.flip))

    def split(self, name: str) -> BatchLoader:
        """Another split, without augmentation."""
        return BatchLoader(self.data.splits[name], self._transform(0, False))

    def _transform(self, pad: int, flip: bool) -> Transform:
        if not self.images:
            return plain
        options = ImageOptions(self.images["mean"], self.images["std"], pad, flip)

        def transform(batch: Batch, generator: torch.Generator | None) -> Batch:
            return {**batch, "x": prepare_images(batch["x"], options, generator)}

        return transform

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of the data in stored results.

        It is computed before any training, since the windows of a text are drawn again each epoch.
        """
        splits = {name: [len(split), _digest(split)] for name, split in self.data.splits.items()}
        return {"shape": list(self.data.shape), "splits": splits, "chooses": self.chooses}

    def reported(self) -> str:
        """One line that says what the accuracies in the table are."""
        count = len(self.data.splits[self.measured])
        final = "the weights that are best on validation" if self.chooses else "the last weights"
        return (
            f"accuracy on {self.measured} ({count:,}): 'final' uses {final}; "
            f"'best' is the best evaluation on {self.measured}, as the paper reports"
        )


def open_paper_data(path: Path, network: str, format: str | None, held_out: float, seed: int) -> PaperData:
    """Open the data of a study.

    Args:
        path: path of the data.
        network: the network of the zoo that takes them.
        format: their format; None: recognise it.
        held_out: share of the training split that chooses the final weights; 0: none.
        seed: seed of the split.

    Raises:
        UsageError: the data do not have the network's kind or shape.
        MpocError: the data are damaged.
    """
    name, options = zoo.parse(network)
    entry = zoo.ENTRIES[name]
    share = held_out or _HELD_OUT
    text = TextOptions(block=options.get("context", 256), seed=seed)
    data = open_data(path, format, text=text)
    kind = "images" if entry.images else "text"
    if data.kind != kind or (entry.images and data.shape != entry.shape):
        shape = "×".join(map(str, entry.shape))
        wanted = f"images of {shape}" if entry.images else "text"
        raise UsageError(f"{path}: {name} takes {wanted}, not {data.announce().partition(': ')[2]}")
    if "train" not in data.splits:
        raise UsageError(f"{path}: no training split, only {', '.join(data.splits)}")
    if "validation" not in data.splits and (held_out or "test" not in data.splits):
        data = hold_out(data, share, seed)
    check_fits(data, vocabulary=options.get("vocab"))
    measured = "test" if "test" in data.splits else "validation"
    if held_out and measured == "validation":
        raise UsageError(
            f"{path}: no test split to evaluate on beside the validation split", "omit --hold-out"
        )
    task: Task = Classification(len(data.classes)) if entry.images else CausalLM()
    images = {key: entry.images[key] for key in ("mean", "std")} if entry.images else {}
    return PaperData(data, task, images, measured, held_out > 0)


def shortened_data(material: PaperData, batch: int, seed: int) -> PaperData:
    """A small random part of every split, for ``--quick``."""
    splits: dict[str, Examples] = {}
    for name, split in material.data.splits.items():
        count = min(len(split), batch * (QUICK_STEPS if name == "train" else _QUICK_MEASURED))
        generator = torch.Generator().manual_seed(derived_seed(seed, "quick", name))
        splits[name] = Subset(split, torch.randperm(len(split), generator=generator)[:count])
    return replace(material, data=replace(material.data, splits=splits))


def _digest(split: Examples) -> str:
    """Digest of all labels or tokens and of the first examples."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(split, TokenStream):
        digest.update(split.tokens.numpy().tobytes())
    if split.y is not None:
        digest.update(split.y.numpy().tobytes())
    first = split.batch(torch.arange(min(16, len(split))))
    for name in sorted(first):
        digest.update(first[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
