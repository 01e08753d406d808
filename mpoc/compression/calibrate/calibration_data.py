"""What of a network's outputs is to be kept, and random directions in it.

Classes and tokens: the distribution they are drawn from, so directions are gradients of log p of labels drawn
from it (their second moment is Fisher's information).  Embeddings: the vector that users compare, pooled and
normalised as the directory of a sentence-transformers model says, else the vector of every token; any other
output: each of its numbers.  Directions are then random signs.

Calibration data: some examples of a data set as batches, and a share of them held out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoc.data import shuffled
from mpoc.errors import MpocError, UsageError
from mpoc.models.call import Batch, Call, first_output, has_logits, rows
from mpoc.models.loading import Model
from mpoc.runtime.device import derived_seed
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import DataOptions
from mpoc.train.training_data import open_training_data

TOKENS = 2048  # of a batch of text, padding included
_IMAGES = 64  # of a batch of anything else


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector of a text."""

    mode: str  # "mean" or "cls"
    normalize: bool

    def __call__(self, states: Tensor, batch: Batch) -> Tensor:
        """(n, T, width) → (n, width)."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        if self.mode == "cls":
            pooled = states[torch.arange(len(states)), mask.argmax(1)]
        else:
            weights = mask[:, :, None].to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def read_pooling(path: Path) -> Pooling | None:
    """What a sentence-transformers directory says; None where it says nothing, or what is not known here.

    Raises:
        MpocError: its ``modules.json`` or pooling configuration cannot be read.
    """
    file = path / "modules.json"
    if not file.is_file():
        return None
    modules = _read(file)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        config = dict(_read(path / modules[1]["path"] / "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise MpocError(f"{file}: damaged ({error!r})") from error
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    mode = modes.get(chosen[0]) if len(chosen) == 1 else None
    return None if mode is None else Pooling(mode, "Normalize" in kinds)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MpocError(f"{file}: cannot be read ({error})") from error


def output_of_interest(outputs: Any, batch: Batch, pooling: Pooling | None = None) -> tuple[Tensor, bool]:
    """(rows, width), and whether these are logits.

    Args:
        outputs: of the network on ``batch``.
        batch: tokens that are padding give no row.
        pooling: for a network that gives the vectors of tokens.
    """
    values = first_output(outputs).float()
    tokens = "input_ids" in batch and values.dim() == 3 and values.shape[:2] == batch["input_ids"].shape
    targets = batch.get("y")
    scores = has_logits(outputs) and (tokens or values.dim() == 2) and values.shape[-1] > 1
    if scores and not (targets is not None and targets.is_floating_point()):
        return rows(values, batch), True
    if pooling is not None and tokens:
        return pooling(values, batch), False
    return rows(values, batch), False


@torch.no_grad()
def direction(values: Tensor, are_logits: bool, generator: torch.Generator) -> Tensor:
    """(rows, width): the gradient of Σ log p(drawn label) by the logits, or random signs."""
    if not are_logits:
        signs = torch.randint(0, 2, values.shape, generator=generator, device=values.device)
        return signs.to(values.dtype) * 2 - 1
    p = values.softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    return p.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))


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
    training_data = open_training_data(options, model, None)
    split = "train" if "train" in training_data.data.splits else next(iter(training_data.data.splits))
    loader = training_data.loader(split)
    if len(loader) < 2:
        raise MpocError(f"{options.path}: {len(loader)} examples in {split}: calibration needs two at least")
    generator = torch.Generator().manual_seed(derived_seed(seed, "calibration"))
    chosen = shuffled(loader.examples, generator)[:samples]
    apart = min(len(chosen) - 1, max(1, round(len(chosen) * held_out)))
    count = f"{len(chosen):,} of {len(loader):,} examples of {split}"
    said = f"calibration: {count} (seed {seed}), {apart:,} held out"
    images = training_data.images
    pixels = f"images: (pixel / 255 − {list(images.mean)}) / {list(images.std)}"
    notes = [training_data.data.announce(), *training_data.data.notes]
    notes += [pixels] if training_data.data.kind == "images" else []
    return CalibrationData(
        _batches(loader, chosen[apart:], tokens), _batches(loader, chosen[:apart], tokens),
        Call.of(model.network),
        read_pooling(model.path) if model.path.is_dir() else None,
        (*notes, said),
    )  # fmt: skip


def _batches(loader: BatchLoader, chosen: Tensor, tokens: int) -> list[Batch]:
    """Texts of about one length together, so that there is little padding."""
    chosen = chosen.sort().values
    lengths = torch.cat([_lengths(loader.read(part)) for part in chosen.split(_IMAGES)])
    if not bool(lengths.any()):
        return [loader.read(part) for part in chosen.split(_IMAGES)]
    order = lengths.argsort(descending=True, stable=True)
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(loader.read(chosen[order[start : start + count]]))
        start += count
    return batches


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each example; 0 where it is no text."""
    if "input_ids" not in batch:
        return torch.zeros(len(next(iter(batch.values()))))
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1)
