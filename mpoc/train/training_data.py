"""What of a training split is held out to measure on: the same in ``eval`` as in the training before.

The data set of a command, and its batches as one network takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mpoc.data import (
    Data,
    HubTokenizer,
    ImageOptions,
    TextOptions,
    check_fits,
    hold_out,
    open_data,
    prepare_images,
)
from mpoc.data.open import data_fingerprint
from mpoc.data.recognise import recognise
from mpoc.data.text import Tokenizer, tokenizer_from_state
from mpoc.errors import MpocError, UsageError, shortened
from mpoc.io.training_history import recorded
from mpoc.io.validation import matches_type
from mpoc.io.weight_files import read_json
from mpoc.models import zoo
from mpoc.models.call import Batch
from mpoc.models.loading import Model
from mpoc.train.loader import BatchLoader, plain

SHARE = 0.1  # of a training split, where there is nothing else to measure on
# The same in ``eval`` as in ``finetune --seed 7``, or training data would be measured.
_SEED = 0

_BLOCK = 256  # tokens


_OF_KIND = {"images": ("mean", "std", "pad", "flip", "size"), "text": ("tokenizer", "block", "column")}


def hold_out_to_train(data: Data, asked: float | None, wants_validation: bool) -> tuple[Data, float]:
    """The set with a validation split where training needs one.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: ``SHARE`` where there is nothing to measure on.
        wants_validation: a test split is nothing to measure on.

    Returns:
        The set, and the share that was held out.

    Raises:
        UsageError: the share is out of range.
    """
    measured = "test" in data.splits and not wants_validation
    return _held(data, (0.0 if measured else SHARE) if asked is None else asked)


def hold_out_to_measure(
    data: Data, asked: float | None, history: dict[str, Any], fingerprint: str
) -> tuple[Data, float]:
    """The set with what a training on it held out, all of it where there was none; ``notes`` says which.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: as the network's training did.
        history: of the network.
        fingerprint: of the data's files.

    Raises:
        UsageError: the share is out of range.
    """
    if asked is not None:
        return _held(data, asked)
    learnt = _trained_on(history, fingerprint)
    found, share = _held(data, (learnt or {}).get("held_out", 0.0))
    if share:
        said = f"{share:.3g} of train is held out, as in the network's training on this set"
    elif list(data.splits) != ["train"]:
        return data, share
    elif learnt is None:
        said = "all of it is measured: no training of the network on this set is recorded"
    else:
        said = "all of it is measured, and all of it is what the network was trained on"
    return replace(found, notes=(*data.notes, said)), share


def _held(data: Data, share: float) -> tuple[Data, float]:
    if not 0 <= share < 1:
        raise UsageError(f"--hold-out {share:g}: a share, at least 0 and below 1")
    if share == 0 or "train" not in data.splits or "validation" in data.splits:
        return data, 0.0
    return hold_out(data, share, _SEED), share


def _trained_on(history: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """The record of the data of the last training on this set."""
    while history:
        found: dict[str, Any] = history.get("data", {})
        if found.get("fingerprint") == fingerprint:
            return found
        history = history.get("earlier", {})
    return None


@dataclass(frozen=True)
class DataOptions:
    """Which data, and what is done to them; None: as the network's record says, or the default."""

    path: Path
    format: str | None = None
    mean: tuple[float, ...] | None = None  # images
    std: tuple[float, ...] | None = None
    pad: int | None = None
    flip: bool | None = None
    size: tuple[int, int] | None = None  # (height, width)
    tokenizer: Path | None = None  # text: a Hugging Face directory
    block: int | None = None
    column: str | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class TrainingData:
    """A data set with what is done to its examples."""

    data: Data
    images: ImageOptions
    block: int  # tokens of an example of text
    fingerprint: str  # of the data's files
    held_out: float  # share of their training split that is the validation split here; 0: none
    numbers: torch.Tensor | None = None  # (classes,): the network's number of each class; None: the same
    classes: dict[str, int] = field(default_factory=dict)  # the network's number by name; {}: no names
    renumbered: bool = False  # the network was trained on classes of other names

    def loader(self, split: str) -> BatchLoader:
        """A split as batches; training ones are augmented where the reader draws."""
        return BatchLoader(self.data.splits[split], self._transform)

    def _transform(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        if self.numbers is not None and "y" in batch:
            batch = {**batch, "y": self.numbers[batch["y"]]}
        if self.data.kind != "images":
            return plain(batch, generator)
        return {**batch, "x": prepare_images(batch["x"], self.images, generator)}


def open_training_data(
    options: DataOptions, model: Model, seed: int | None, wants_validation: bool = False
) -> TrainingData:
    """Open the data set for a network.

    Args:
        options: which, and how.
        model: whose record fills in what the options leave open.
        seed: of the windows of a text; None: nothing is trained, and text is read in order.
        wants_validation: a validation split is needed even where there is a test split.

    Raises:
        UsageError: options that do not fit.
        MpocError: bad data.
    """
    images = image_options(options, model)
    block = _block(model) if options.block is None else options.block
    tokenizer = _tokenizer(options, model)
    text = TextOptions(tokenizer, block, options.column, seed)
    data = open_data(options.path, options.format, text=text, size=images.size)
    digest = data_fingerprint(data.path, data.format)
    if seed is None:
        data, held_out = hold_out_to_measure(data, options.held_out, model.history, digest)
    else:
        data, held_out = hold_out_to_train(data, options.held_out, wants_validation)
    _refuse_unused(options, data)
    check_fits(data, shape=_shape(data, model), images=images, vocabulary=_vocabulary(model))
    if data.kind == "text" and tokenizer is None:
        data = _own_characters(data, model, trains=seed is not None)
    return _with_classes(TrainingData(data, images, block, digest, held_out), model)


def _refuse_unused(options: DataOptions, data: Data) -> None:
    """Options for another kind of data than this.

    Raises:
        UsageError: one is given.
    """
    for kind, names in _OF_KIND.items():
        given = [name for name in names if getattr(options, name) is not None]
        if given and kind != data.kind:
            raise UsageError(
                f"--{given[0]} is for {kind}, and {data.path} holds {data.kind}",
                "images are arrays of uint8" if kind == "images" else None,
            )


def image_options(options: DataOptions, model: Model) -> ImageOptions:
    """What is done to images: as asked, as in training, as zoo or directory says, else scaled to [0, 1]."""
    try:
        known = matches_type(ImageOptions(**_recorded_images(model)))
    except TypeError as error:
        said = shortened(error)
        raise MpocError(f"{model.path}: damaged record of what is done to images ({said})") from error
    asked = {
        name: value
        for name in ("mean", "std", "pad", "flip", "size")
        if (value := getattr(options, name)) is not None
    }
    return replace(known, **asked)


def _recorded_images(model: Model) -> dict[str, Any]:
    trained = recorded(model.history, "images")
    if trained:
        return dict(trained)
    spec = zoo_spec(model)
    if spec is not None:
        return zoo.ENTRIES[zoo.parse(spec)[0]].images
    file = model.path / "preprocessor_config.json"
    if not (model.path.is_dir() and file.is_file()):
        return {}
    words = read_json(file)
    size = words.get("size")
    found = {"mean": words.get("image_mean"), "std": words.get("image_std")}
    if isinstance(size, dict) and "height" in size and "width" in size:
        found["size"] = (size["height"], size["width"])
    return {name: value for name, value in found.items() if value is not None}


def zoo_spec(model: Model) -> str | None:
    """The network's name in the zoo, where it is of it."""
    arch = model.architecture
    return arch if arch is not None and arch.partition(":")[0] in zoo.ENTRIES else None


def _tokenizer(options: DataOptions, model: Model) -> Tokenizer | None:
    """As asked, else as recorded in training, else the directory's own, else the characters of the text."""
    if options.tokenizer is not None:
        return HubTokenizer(options.tokenizer)
    state = recorded(model.history, "tokenizer") or {}
    files = ("tokenizer.json", "tokenizer_config.json")
    own = model.path.is_dir() and any((model.path / name).is_file() for name in files)
    if own and "characters" not in state:
        state = {"directory": str(model.path)}
    if state:
        try:
            return tokenizer_from_state(state)
        except MpocError:
            if recognise(options.path, options.format) in ("txt", "jsonl", "parquet"):
                raise
    return None


def _own_characters(data: Data, model: Model, trains: bool) -> Data:
    """Say that the characters are numbered as in this text, or that they cannot be.

    Raises:
        MpocError: the network is measured, and has learnt others.
    """
    count, known = data.tokenizer.vocab_size if data.tokenizer else 0, _vocabulary(model)
    if not trains and known not in (None, count):
        raise MpocError(
            f"{data.path}: has {count} different characters and the network {known}; it does not record "
            "which has which number",
            "measure it on the text it was trained on, or train it with mpoc finetune, which records them",
        )
    said = "characters are numbered in their order in this text: the network records no numbers of its own"
    return replace(data, notes=(*data.notes, said))


def _shape(data: Data, model: Model) -> tuple[int, ...] | None:
    """Of one image, where the network is of the zoo."""
    spec = zoo_spec(model)
    return zoo.ENTRIES[zoo.parse(spec)[0]].shape if spec is not None and data.kind == "images" else None


def _with_classes(training_data: TrainingData, model: Model) -> TrainingData:
    """Classes numbered as in training, else as in config.json, where the data name the same ones."""
    data = training_data.data
    if not data.classes or data.classes == tuple(map(str, range(len(data.classes)))):
        return training_data
    learnt: dict[str, int] = recorded(model.history, "classes") or {}
    known = learnt or getattr(getattr(model.network, "config", None), "label2id", None) or {}
    unknown = [name for name in data.classes if name not in known]
    if unknown:
        own = {name: number for number, name in enumerate(data.classes)}
        if learnt:
            said = f"the network was trained on other classes, without {unknown[0]!r}: all are numbered anew"
            data = replace(data, notes=(*data.notes, said))
        return replace(training_data, data=data, classes=own, renumbered=bool(learnt))
    numbers = [int(known[name]) for name in data.classes]
    if numbers == list(range(len(numbers))):
        return replace(training_data, classes=dict(known))
    where = "training" if learnt else "the model's config.json"
    data = replace(data, notes=(*data.notes, f"classes are numbered as in {where}"))
    return replace(training_data, data=data, numbers=torch.tensor(numbers), classes=dict(known))


def _vocabulary(model: Model) -> int | None:
    spec = zoo_spec(model)
    if spec is not None:
        return zoo.parse(spec)[1].get("vocab")
    found = getattr(getattr(model.network, "config", None), "vocab_size", None)
    return found if isinstance(found, int) else None


def _block(model: Model) -> int:
    spec = zoo_spec(model)
    if spec is not None:
        return zoo.parse(spec)[1].get("context", _BLOCK)
    longest = getattr(getattr(model.network, "config", None), "max_position_embeddings", None)
    return min(_BLOCK, longest) if isinstance(longest, int) and longest > 0 else _BLOCK


def choose_split(data: Data, wanted: str | None) -> str:
    """The split to measure on: ``wanted``, else test, validation or train, the first there is.

    Raises:
        UsageError: the set has no such split.
    """
    if wanted is not None and wanted not in data.splits:
        raise UsageError(f"{data.path}: no split {wanted!r}, only {', '.join(data.splits)}")
    return wanted or next(name for name in ("test", "validation", "train") if name in data.splits)


def monitored_split(data: Data) -> str | None:
    """The split that is measured while training; test only where nothing is chosen by it."""
    return next((name for name in ("validation", "test") if name in data.splits), None)
