"""What calibration needs: a dense network, how it is called, and batches to fit, choose and report on.

The examples are drawn from a data set on disk, or from batches that a caller hands over: tensors, tuples that
begin with the input, or dicts as transformers takes them.  Texts of about one length go into one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from mpoc.compression.calibrate.layer_inputs import device_of
from mpoc.compression.calibrate.output_of_interest import Pooling, read_pooling
from mpoc.compression.recipe import DEFAULT_EFFORT
from mpoc.data import Examples, prepare_images, shuffled
from mpoc.errors import MpocError, UsageError
from mpoc.io.keyed_store import Scratch
from mpoc.models.call import (
    Batch,
    BatchConverter,
    Call,
    num_examples,
    to_device,
)
from mpoc.models.loading import Model, open_model
from mpoc.models.self_made_data import SELF, SelfMadeData, make_data
from mpoc.runtime.device import derived_seed
from mpoc.train.evaluate import try_call
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import DataOptions
from mpoc.train.training_data import image_options, open_training_data

_TOKENS = 2048  # of a batch of text, padding included
_TOKENS_TO_REFINE = 512  # the same: more steps are worth more than wide ones
_TOKENS_WRITTEN = 1 << 15  # of a causal language model's own texts, about as many as a few hundred texts have
_EXAMPLES = 64  # of a batch of anything else
_NUMBERS = (
    1 << 19
)  # in the examples of such a batch: what a network keeps of them for gradients is a multiple
_HELD_OUT = 0.125  # share of the examples, one at least
_UNSEEN = 1 / 3  # share of these where the data set has no more
WATCHED = 4  # examples of a watched pass
_WATCHED_TOKENS = 512  # in all, where these are several texts
_PER_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "y"}


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on."""

    data: Any  # the path of a data set, an iterable of batches, or SELF for data made for the network
    samples: int = 512
    refine: bool = False  # the layers of each block together, once all are fitted
    moments: Path | None = None  # file to keep the measurements of the dense network in
    folder: Path | None = None  # to keep what is found before layers are fitted, and resume from
    scratch: Path | None = None  # folder for what need not be in memory; None: beside an output, if any
    scratch_required: bool = True  # an error where its disk has no room; else memory holds the rest
    effort: str = DEFAULT_EFFORT  # of the fits, to tell how long they will take
    optional: bool = False  # fit to the weights alone where the network cannot be calibrated

    def make_scratch(self) -> Scratch:
        """A scratch in the folder, or in memory where there is none."""
        return Scratch(self.scratch, required=self.scratch_required)


def named_data(name: str | PathLike[str]) -> Path | str:
    """What ``--calibrate`` names: ``"self"``, or the path of a data set."""
    return name if name == SELF else Path(name)


@dataclass(frozen=True)
class CalibrationData:
    """A dense network and the batches it is calibrated on; the three parts have no example in common."""

    network: nn.Module  # in evaluation mode, parameters in float32 or better
    places: Mapping[str, str]  # name of a tensor in the checkpoint → in the network
    call: Call  # how the network takes a batch
    batches: list[Batch]  # on the CPU
    held_out: list[Batch]  # to choose between fits with
    unseen: list[Batch]  # to report the likeness of outputs on; empty where there are too few examples
    pooling: Pooling | None = None  # how users read its outputs, where its directory says
    name: str = ""  # of the data set, for the manifest
    notes: tuple[str, ...] = ()  # what was read and chosen, a line each


def open_calibration(
    source: Path, arch: str | None, request: CalibrationRequest, seed: int = 0
) -> CalibrationData:
    """The network of a checkpoint, with calibration data.

    Args:
        source: the checkpoint.
        arch: its network, as ``--arch`` names it; None where the checkpoint says it.
        request: on what to calibrate.
        seed: of the examples drawn.

    Raises:
        UsageError: no architecture is known, or options that do not fit.
        MpocError: bad data, or fewer than two examples.
    """
    return calibrate_on(open_model(source, arch, request.make_scratch()), request, seed)


def calibrate_on(model: Model, request: CalibrationRequest, seed: int = 0) -> CalibrationData:
    """The network of an open model, with calibration data.

    Raises:
        UsageError: options that do not fit, or batches that the network cannot take.
        MpocError: bad data, or fewer than two examples.
    """
    if request.samples < 2:
        raise UsageError(
            f"--calibration-samples {request.samples}: at least 2, one to fit on and one held out"
        )
    pooling, domains = read_pooling(model.path) if model.path.is_dir() else None, None
    if isinstance(request.data, Path):
        loader, split, notes = _open_data_set(request.data, model)
        call, where, name = Call.of(model.network), str(request.data), request.data.resolve().name
    elif isinstance(request.data, str):
        call, where = Call.of(model.network), request.data
        made = make_data(model, request.samples, seed, _TOKENS_WRITTEN)
        loader, notes = _loader_of(made, model)
        split, name, domains = made.name, made.name, made.domains
        longest = _lengths(made.batch).argmax()[None]
        try_call(call, model.network, to_device(loader.read(longest), device_of(model.network)))
    else:
        examples, call = examples_of(request.data, model.network, request.samples)
        loader, split, notes = BatchLoader(examples, _as_given), "batches", []
        where, name = "calibrate", type(request.data).__name__
    if len(loader) < 2:
        raise MpocError(f"{where}: {len(loader)} examples in {split}: calibration needs two at least")
    tokens = _TOKENS_TO_REFINE if request.refine else _TOKENS
    parts = draw(loader, request.samples, seed, tokens, domains)
    counts = [sum(map(num_examples, part)) for part in parts]
    drawn = f"{sum(counts):,} of {len(loader):,} examples of {split} (seed {seed})"
    reported = f", {counts[2]:,} to report on" if counts[2] else ""
    notes.append(f"calibration: {drawn}, {counts[1]:,} held out to choose with{reported}")
    return CalibrationData(model.network, model.places, call, *parts, pooling, name, tuple(notes))


def _as_given(batch: Batch, generator: torch.Generator | None) -> Batch:
    return batch


def _open_data_set(path: Path, model: Model) -> tuple[BatchLoader, str, list[str]]:
    """The training split or the first there is, its name, and notes.

    Examples that a training of the network on this set held out, so that ``mpoc eval`` measures them, are
    not among them.
    """
    opened = open_training_data(DataOptions(path), model, None)
    split = "train" if "train" in opened.data.splits else next(iter(opened.data.splits))
    notes = [opened.data.announce(), *opened.data.notes]
    if opened.data.kind == "images":
        images = opened.images
        notes.append(f"images: (pixel / 255 − {list(images.mean)}) / {list(images.std)}")
    return opened.loader(split), split, notes


def _loader_of(made: SelfMadeData, model: Model) -> tuple[BatchLoader, list[str]]:
    """Examples made for the network, and notes; images are preprocessed as those of a data set are."""
    examples = HeldExamples(made.batch)
    if all(values.dtype != torch.uint8 for values in made.batch.values()):
        return BatchLoader(examples, _as_given), []
    images = replace(image_options(DataOptions(model.path), model), size=None)  # made in its size
    note = f"images: (pixel / 255 − {list(images.mean)}) / {list(images.std)}"
    return BatchLoader(examples, lambda batch, _: {"x": prepare_images(batch["x"], images)}), [note]


def draw(
    loader: BatchLoader, samples: int, seed: int, tokens: int = _TOKENS, domains: Tensor | None = None
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches of examples drawn at random to fit on, to choose with (an eighth), and to report on.

    The last are as many more as are held out to choose with, or a third of these where there are no more.

    Args:
        loader: two examples at least.
        samples: how many examples to fit on and to choose with; all where there are fewer.
        seed: of the draw.
        tokens: of a batch of text at most, padding included, where it is more than one text.
        domains: (n,) of the examples; all that are held out are then of a few, and one at most is in both.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "calibration"))
    every = shuffled(loader.examples, generator)
    chosen, others = every[:samples], every[samples:]
    if domains is not None:
        rank = torch.randperm(int(domains.max()) + 1, generator=generator)
        chosen = chosen[rank[domains[chosen]].argsort(stable=True)]
    apart = min(len(chosen) - 1, max(1, round(len(chosen) * _HELD_OUT)))
    cut = 0 if len(others) else int(_UNSEEN * apart)
    held_out, unseen = chosen[cut:apart], others[:apart] if len(others) else chosen[:cut]
    parts = chosen[apart:], held_out, unseen
    batches, to_choose, to_report = (_batches(loader, part, tokens) if len(part) else [] for part in parts)
    return batches, to_choose, to_report


def _batches(loader: BatchLoader, chosen: Tensor, tokens: int) -> list[Batch]:
    """Batches in which texts are of about one length, so that there is little padding."""
    chosen = chosen.sort().values
    lengths = torch.cat([_lengths(loader.read(part)) for part in chosen.split(_EXAMPLES)])
    if not bool(lengths.any()):
        numbers = max(values[0].numel() for values in loader.read(chosen[:1]).values())
        return [loader.read(part) for part in chosen.split(max(1, min(_EXAMPLES, _NUMBERS // numbers)))]
    order = lengths.argsort(descending=True, stable=True)
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(loader.read(chosen[order[start : start + count]]))
        start += count
    return batches


def _lengths(batch: Batch) -> Tensor:
    """The number of tokens of each example; 0 where it is not text."""
    if "input_ids" not in batch:
        return torch.zeros(len(next(iter(batch.values()))))
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1)


class DatasetExamples(Examples):
    """The data set of a ``DataLoader``, each example read when it is asked for."""

    def __init__(self, loader: DataLoader[Any], convert: BatchConverter) -> None:
        self._loader, self._convert = loader, convert
        self._dataset: Any = loader.dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """These examples, as the loader collates them."""
        chosen = torch.as_tensor(indices).tolist()
        batch, _ = self._convert(self._loader.collate_fn([self._dataset[k] for k in chosen]))
        return trimmed(batch)


class HeldExamples(Examples):
    """Examples in memory, one tensor (n, …) for each name."""

    def __init__(self, tensors: Batch) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return num_examples(self._tensors)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """These examples."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return trimmed({name: values[chosen] for name, values in self._tensors.items()})


def examples_of(given: Any, network: nn.Module, samples: int) -> tuple[Examples, Call]:
    """The examples of batches that a caller hands over, and how the network is called with them.

    Args:
        given: a ``DataLoader`` or any iterable of batches, or one batch.  Of a loader that reads a data set
            in order or at random, and of a list, all examples count; of another iterable as many as
            ``samples``, from the first one on.
        network: that takes the batches.
        samples: how many are needed.

    Raises:
        UsageError: no iterable of batches, or batches that the network cannot take.
        MpocError: it yields none.
    """
    convert = BatchConverter(network)
    if _reads_by_index(given):
        examples = DatasetExamples(given, convert)
        _, call = convert(given.collate_fn([given.dataset[0]])) if len(examples) else ({}, Call.of(network))
        return examples, call
    if not isinstance(given, Iterable):
        raise UsageError(f"calibrate: a {type(given).__name__} is no path and no iterable of batches")
    given = [given] if isinstance(given, Tensor | Mapping) else given
    every = iter(given)
    batches: list[Batch] = []
    calls: list[Call] = []
    wanted = float("inf") if isinstance(given, Sequence) else samples
    while sum(map(num_examples, batches)) < wanted and (taken := list(islice(every, 1))):
        batch, call = convert(taken[0])
        batches, calls = [*batches, batch], [*calls, call]
    if not batches:
        raise MpocError(f"calibrate: {type(given).__name__} yields no batches")
    tensors, call = _concatenated(batches, "attention_mask" in convert.names), calls[0]
    if not isinstance(given, Sequence):
        tensors = {name: values[:samples] for name, values in tensors.items()}
    return HeldExamples(tensors), call


def _reads_by_index(given: Any) -> bool:
    """Whether ``given`` is a loader whose data set can be read by index in place of the loader."""
    if not isinstance(given, DataLoader) or given.batch_sampler is None:
        return False
    sampler: Any = given.sampler
    in_order = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement
    )
    return in_order and sampler.data_source is given.dataset


def _concatenated(batches: list[Batch], takes_mask: bool) -> Batch:
    """All examples as one batch; tokens are padded to the longest where a mask says so.

    Raises:
        UsageError: the batches hold different tensors.
    """
    lengths = {batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch}
    if len(lengths) > 1 and (takes_mask or all("attention_mask" in batch for batch in batches)):
        batches = [_padded(batch, max(lengths)) for batch in batches]
    for batch in batches:
        for name in batches[0].keys() | batch.keys():
            shapes = [tuple(one[name].shape[1:]) if name in one else None for one in (batches[0], batch)]
            if shapes[0] != shapes[1]:
                raise UsageError(
                    f"calibrate: the batches differ: {name} of an example is {shapes[0]} and {shapes[1]}",
                    "examples of one shape, or tokens with an attention_mask",
                )
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _padded(batch: Batch, width: int) -> Batch:
    """The batch with its tokens, and what goes with each of them, padded with zeros to ``width``."""
    tokens = batch["input_ids"]
    batch = {"attention_mask": torch.ones_like(tokens), **batch}
    return {
        name: F.pad(v, (*[0, 0] * (v.dim() - 2), 0, width - v.shape[1])) if _is_per_token(v, tokens) else v
        for name, v in batch.items()
    }


def _is_per_token(values: Tensor, tokens: Tensor) -> bool:
    return values.dim() > 1 and values.shape[:2] == tokens.shape


def trimmed(batch: Batch) -> Batch:
    """The batch without the columns that are padding in every example, if all its tensors are per token."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or not batch.keys() <= _PER_TOKEN or not bool(mask.any()):
        return batch
    end = int(mask.any(0).nonzero().max()) + 1
    return {name: v[:, :end] if _is_per_token(v, mask) else v for name, v in batch.items()}


def glimpse(batch: Batch) -> Batch:
    """The first examples of a batch, whole, and the fewer the longer texts are: what a pass is watched on.

    Texts are not cut: some models need the length that they are given.
    """
    tokens = batch.get("input_ids")
    width = tokens.shape[1] if tokens is not None and tokens.dim() > 1 else 1
    count = min(WATCHED, max(1, _WATCHED_TOKENS // max(1, width)))
    return {name: values[:count] for name, values in batch.items()}
