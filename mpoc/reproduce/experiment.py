"""An experiment of a paper: network, replaced layers, training, published results, and the data set it uses.

The papers write a structure as M(I_1,…,I_n → J_1,…,J_n)(D), Eq. (8) of Gao et al. 2020.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
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
from mpoc.reproduce.image_states import ORDERS
from mpoc.runtime.device import derived_seed
from mpoc.train.loader import BatchLoader, Transform, plain
from mpoc.train.settings import Settings
from mpoc.train.tasks import CausalLM, Classification, Task

_ORDERS = {**ORDERS, "channels": "channels-first order"}
_NAMES = {"mpo": "M", "tree": "tree", "mera": "MERA"}
_HELD_OUT = 0.1  # share of the training split, if the data have no split to evaluate on
QUICK_STEPS = 10
_QUICK_MEASURED = 5  # batches
DENSE, CONTROL = "dense", "control"  # starts of networks without cores; a control trains longer
DENSE_STARTS = (DENSE, CONTROL)
TTSVD, RESCALED = "ttsvd", "rescaled"  # TT-SVD of dense weights, as it is or with their norms
FROM_DENSE = (TTSVD, RESCALED)
RANDOM = "random"
STARTS = (*FROM_DENSE, RANDOM)  # of networks with cores
GAO = "Gao et al., Phys. Rev. Research 2, 023300 (2020)"


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that is replaced, and the structure of its cores."""

    name: str  # of the module in the zoo's network
    inputs: tuple[int, ...]  # I
    outputs: tuple[int, ...]  # J
    bond: int | None = None  # None: the D of the experiment
    size: tuple[int, ...] = ()  # of a convolution that becomes one whole map: (height, width) of its input
    # In which the cores take the inputs: of pixels.ORDERS, of a square image; or "channels" first.
    order: str = "raster"
    form: str = "mpo"  # of mpoc.tensor_networks.forms.FORMS

    def notation(self, bond: int | None = None) -> str:
        """``fc1 M(4,7,7,4→4,4,4,4)(D)``."""
        sides = "→".join(",".join(map(str, side)) for side in (self.inputs, self.outputs))
        order = "" if self.order == "raster" else f", inputs in {_ORDERS[self.order]}"
        return f"{self.name} {_NAMES[self.form]}({sides})({self.bond or bond or 'D'}){order}"


@dataclass(frozen=True)
class Published:
    """A result that the paper reports."""

    where: str  # "Table I"
    accuracy: float | None = None  # per cent; None: the paper draws or says it, and prints no number
    sigma: float | None = None
    rho: float | None = None
    words: str = ""  # what it says where it prints no number
    parameters: tuple[int, int] = (0, 0)  # of the fully connected layers, and of all

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"{self.words} ({self.where})"
        sigma = "" if self.sigma is None else f" ± {self.sigma:.2f}"
        return f"{self.accuracy:.2f}{sigma} ({self.where})"


@dataclass(frozen=True)
class Training:
    """A training, the same for the dense network and for every start of the MPO-Net.

    With a control the settings are those of the whole way: the dense network takes two thirds of it and each
    TT-SVD of that network the last third; random cores and a second dense network, the control, take all.
    """

    settings: Settings
    pad: int = 0  # pixels: shifts drawn at random
    flip: bool = False
    note: str = ""  # where it departs from the paper's own, or from what a reader would expect
    shortened: str = ""  # "20 epochs in place of the paper's 500 epochs"; "" where it is as long
    control: bool = False  # whether every MPO-Net, with the network it starts from, takes the same time

    def of(self, start: str) -> Training:
        """The training of the networks of one start: with a control a part of it, to a step."""
        shares = {DENSE: 2 / 3} | dict.fromkeys(FROM_DENSE, 1 / 3)
        share = shares.get(start, 1.0) if self.control else 1.0
        if share == 1:
            return self
        settings = self.settings
        if settings.steps is None:
            part = replace(settings, epochs=whole_or_float(share * settings.epochs))
        else:
            last = max(1, round(settings.steps / 3))
            steps = last if start in FROM_DENSE else max(1, settings.steps - last)
            part = replace(settings, steps=steps)
        shortened = self.shortened.replace(length_of(settings), length_of(part), 1)
        return replace(self, settings=part, shortened=shortened)

    def words(self) -> str:
        """The training in one line, for tables."""
        s = self.settings
        long = f"shortened to {self.shortened}" if self.shortened else length_of(s)
        momentum = f" momentum {s.momentum:g}" if s.optimizer == "sgd" and s.momentum else ""
        nesterov = " (Nesterov)" if s.nesterov else ""
        schedule = s.schedule
        if s.schedule == "exponential":
            schedule = f"×{s.gamma:.4g} every {s.decay_every} epoch(s)"
        optimizer = "adam" if s.optimizer == "adamw" and not s.weight_decay else s.optimizer
        parts = [long, f"batch {s.batch}", f"{optimizer}{momentum}{nesterov}", f"lr {s.peak:g} {schedule}"]
        parts += [f"warm-up {s.warmup:g}"] if s.warmup else []
        parts += [f"L2 {s.l2:g}" if s.l2 else "no L2"]
        parts += [f"random shifts of {self.pad} pixels"] if self.pad else []
        parts += ["random flips"] if self.flip else []
        if s.patience is not None:
            every = f"one every {s.eval_every} steps" if s.eval_every else "one per epoch"
            parts.append(f"stopped after {s.patience} evaluations ({every}) without improvement")
        return ", ".join(parts)


def whole_or_float(epochs: float) -> float:
    """1 for 1.0, so that a finished network is found by its settings."""
    return int(epochs) if float(epochs).is_integer() else epochs


def length_of(settings: Settings) -> str:
    """``20 epochs`` or ``2,000 steps``."""
    if settings.steps is not None:
        return f"{settings.steps:,} steps"
    return f"{settings.epochs:g} epoch{'' if settings.epochs == 1 else 's'}"


@dataclass(frozen=True)
class Experiment:
    """One network with one set of replaced layers, at one or more D."""

    label: str  # of this variant in tables, as "depth 56"
    network: str  # of the zoo, as "resnet:depth=56,width=4"
    layers: tuple[ReplacedLayer, ...]
    bonds: tuple[int, ...]  # the D's; () where every layer has a bond of its own
    training: Training
    paper_training: Training | None  # None: the source has none
    data: str  # what the paper trained on
    dense: Published
    published: dict[int, Published] = field(default_factory=dict)  # by D; 0 where there are no D's
    x: float = 0.0  # place in a figure over something else than D
    notes: tuple[str, ...] = ()  # on the structure
    # Above 0 each bond is the smallest that discards at most this share of the weight's squared norm: of the
    # dense weight, or of random cores trained at D before.
    discard: float = 0.0
    starts: tuple[str, ...] = STARTS  # those it can be done from
    with_dense: bool = True  # whether its dense network is trained too; else another variant is that
    series: str = ""  # what is joined by a line in a figure over parameters


@dataclass(frozen=True)
class Study:
    """The experiments of one name of ``mpoc reproduce``."""

    name: str
    title: str
    source: str
    variants: dict[str, Experiment]
    quick_batch: int  # of --quick
    axis: str = "D"  # what a figure runs over: D, parameters, or the x of the experiments
    shown: tuple[str, ...] = ()  # the variants that are done unless asked otherwise; (): the first
    held_out: float = 0.0  # share of the training split that chooses the weights, unless asked otherwise
    baseline: str = ""  # the variant with whose fully connected layers the paper compares those of all others
    head: int = 0  # what the paper then counts for the last layer
    control: bool = False  # whether a budget is shared as in a training with a control
    starts: tuple[str, ...] = (TTSVD, RANDOM)  # done unless asked otherwise


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
