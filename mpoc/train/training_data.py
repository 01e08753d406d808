"""The data set of a command, opened, checked and preprocessed for one network.

Options that the command leaves open follow the network: its training history, its place in the zoo, or its
Hugging Face directory.  Without a data set, examples are made for the network.  A training split without a
split to measure on gives a share of its examples as validation; ``eval`` repeats the split that the training
recorded.
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
from mpoc.data.arrays import Arrays
from mpoc.data.documents import Documents
from mpoc.data.open import data_fingerprint
from mpoc.data.recognise import recognise
from mpoc.data.text import Tokenizer, tokenizer_from_state
from mpoc.errors import MpocError, UsageError, shortened
from mpoc.io.training_history import recorded
from mpoc.io.validation import build_dataclass
from mpoc.io.weight_files import read_json
from mpoc.models import zoo
from mpoc.models.call import Batch
from mpoc.models.loading import Model
from mpoc.models.packaged import image_facts
from mpoc.models.self_made_data import SelfMadeData, make_data
from mpoc.runtime.packages import is_packaged
from mpoc.train.loader import BatchLoader, plain
from mpoc.train.settings import DataOptions

SELF_MADE = "self-made"  # in the place of a data set's name and fingerprint
SHARE = 0.1  # of the training split, held out where there is no other split to measure on
# One seed for ``eval`` and any ``finetune --seed``; otherwise training examples would be measured.
_SEED = 0
_BLOCK = 256  # tokens
_SELF_MADE = 1024  # examples
_PREPROCESSING = ("mean", "std", "pad", "flip", "size")
_OF_KIND = {"images": _PREPROCESSING, "text": ("tokenizer", "block", "column")}
_OF_FILES = ("format", "tokenizer", "block", "column")
_FLAGS = {"size": "image-size"}  # of the options that are called otherwise


def hold_out_to_train(data: Data, asked: float | None, wants_validation: bool) -> tuple[Data, float]:
    """Hold out a validation split where training needs one.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: ``SHARE`` where there is no split to measure on.
        wants_validation: a test split does not count as a split to measure on.

    Returns:
        The data set, and the share that was held out.

    Raises:
        UsageError: the share is out of range.
    """
    measured = "test" in data.splits and not wants_validation
    return _hold_out(data, (0.0 if measured else SHARE) if asked is None else asked)


def hold_out_to_measure(
    data: Data, asked: float | None, history: dict[str, Any], fingerprint: str
) -> tuple[Data, float]:
    """Hold out what the network's training on this data set held out; ``notes`` says what is measured.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: as recorded, nothing where no training is recorded.
        history: training history of the network.
        fingerprint: fingerprint of the files of the data set.

    Returns:
        The data set, and the share that was held out.

    Raises:
        UsageError: the share is out of range.
    """
    if asked is not None:
        return _hold_out(data, asked)
    training = _trained_on(history, fingerprint)
    split, share = _hold_out(data, (training or {}).get("held_out", 0.0))
    if share:
        note = f"{share:.3g} of train is held out, as in the network's training on this set"
    elif list(data.splits) != ["train"]:
        return data, share
    elif training is None:
        note = "all examples are measured: no training on this data set is recorded"
    else:
        note = "all examples are measured, and the network was trained on all of them"
    return replace(split, notes=(*data.notes, note)), share


def _hold_out(data: Data, share: float) -> tuple[Data, float]:
    if not 0 <= share < 1:
        raise UsageError(f"--hold-out {share:g}: must be at least 0 and below 1")
    if share == 0 or "train" not in data.splits or "validation" in data.splits:
        return data, 0.0
    return hold_out(data, share, _SEED), share


def _trained_on(history: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """The data record of the last training on this data set."""
    while history:
        record: dict[str, Any] = history.get("data", {})
        if record.get("fingerprint") == fingerprint:
            return record
        history = history.get("earlier", {})
    return None


@dataclass(frozen=True)
class TrainingData:
    """A data set and how its examples are preprocessed."""

    data: Data
    images: ImageOptions
    block: int  # tokens per example of text
    fingerprint: str  # of the files
    held_out: float  # share of the training split that became the validation split; 0: none
    numbers: torch.Tensor | None = None  # (classes,) the network's index of each class; None: the same
    classes: dict[str, int] = field(default_factory=dict)  # the network's index by name; {}: no names
    renumbered: bool = False  # the network was trained on classes of other names

    def loader(self, split: str) -> BatchLoader:
        """The batches of a split; augmented where they are read with a generator."""
        return BatchLoader(self.data.splits[split], self._transform)

    def _transform(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        if self.numbers is not None and "y" in batch:
            batch = {**batch, "y": self.numbers[batch["y"]]}
        if self.data.kind != "images":
            return plain(batch, generator)
        return {**batch, "x": prepare_images(batch["x"], self.images, generator)}


def open_training_data(
    options: DataOptions,
    model: Model,
    seed: int | None,
    wants_validation: bool = False,
    original: Model | None = None,
) -> TrainingData:
    """Open and check the data set for a network.

    Args:
        options: which data set, and how it is preprocessed; without one, examples are made.
        model: its history and directory supply what the options leave open.
        seed: seed of the random blocks of a text; None: no training, and text is read in order.
        wants_validation: a validation split is needed even where there is a test split.
        original: the network that the other one is compared with; without a data set it makes the examples.

    Raises:
        UsageError: options that do not fit the data, or need one.
        MpocError: bad data, or data that do not fit the network.
    """
    if options.path is None and (given := [name for name in _OF_FILES if getattr(options, name) is not None]):
        raise UsageError(f"--{given[0]} requires --data: without it, examples are made for the network")
    images = image_options(options, model)
    block = _block(model) if options.block is None else options.block
    tokenizer = _tokenizer(options, model)
    if options.path is None:
        data, digest = _self_made(make_data(original or model, _SELF_MADE)), SELF_MADE
    else:
        text = TextOptions(tokenizer, block, options.column, seed)
        data = open_data(options.path, options.format, text=text, size=images.size)
        digest = data_fingerprint(data.path, data.format)
    if seed is None:
        data, held_out = hold_out_to_measure(data, options.held_out, model.history, digest)
    else:
        data, held_out = hold_out_to_train(data, options.held_out, wants_validation)
        for examples in data.splits.values():
            examples.check()  # damage is told before the training, not in the middle of it
    _refuse_unused(options, data)
    check_fits(data, shape=_shape(data, model), images=images, vocabulary=_vocabulary(model))
    if data.tokenizer is not None and tokenizer is None:
        data = _own_characters(data, model, trains=seed is not None)
    return _with_classes(TrainingData(data, images, block, digest, held_out), model)


def _self_made(made: SelfMadeData) -> Data:
    """Examples without labels that were made for a network, as a data set."""
    if "input_ids" in made.batch:
        tokens = made.batch["input_ids"]
        mask = made.batch.get("attention_mask", torch.ones_like(tokens)).bool()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        pad = int(tokens[~mask][0]) if not bool(mask.all()) else 0
        texts = Documents(tokens[mask].int(), starts, pad, None)
        return Data(Path(SELF_MADE), made.name, "text", {"train": texts}, (), ())
    x = made.batch["x"]
    kind = "images" if x.dtype == torch.uint8 else "arrays"
    return Data(Path(SELF_MADE), made.name, kind, {"train": Arrays([x], None)}, (), tuple(x.shape[1:]))


def _refuse_unused(options: DataOptions, data: Data) -> None:
    """Check that no option is for another kind of data.

    Raises:
        UsageError: an option is.
    """
    for kind, names in _OF_KIND.items():
        given = [name for name in names if getattr(options, name) is not None]
        if given and kind != data.kind:
            raise UsageError(
                f"--{_FLAGS.get(given[0], given[0])} applies to {kind}, but {data.path} holds {data.kind}",
                "images are arrays of uint8" if kind == "images" else None,
            )


def image_options(options: DataOptions, model: Model) -> ImageOptions:
    """Preprocessing of images: as asked, as in training, as the network's source says, else in [0, 1]."""
    try:
        known = build_dataclass(ImageOptions, _recorded_images(model))
    except (TypeError, ValueError) as error:
        raise MpocError(
            f"{model.path}: damaged record of the preprocessing of images ({shortened(error)})"
        ) from error
    asked = {name: value for name in _PREPROCESSING if (value := getattr(options, name)) is not None}
    return replace(known, **asked)


def _recorded_images(model: Model) -> dict[str, Any]:
    trained = recorded(model.history, "images")
    if trained:
        return dict(trained)
    spec = model.zoo_spec
    if spec is not None:
        return zoo.ENTRIES[zoo.parse(spec)[0]].images
    if is_packaged(model.architecture or ""):
        return image_facts(model.architecture or "")
    file = model.path / "preprocessor_config.json"
    if not (model.path.is_dir() and file.is_file()):
        return {}
    config = read_json(file)
    size = config.get("size")
    images = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    if isinstance(size, dict) and "height" in size and "width" in size:
        images["size"] = (size["height"], size["width"])
    return {name: value for name, value in images.items() if value is not None}


def _tokenizer(options: DataOptions, model: Model) -> Tokenizer | None:
    """The requested, recorded or directory's tokenizer, in this order; None: the characters of the text."""
    if options.tokenizer is not None:
        return HubTokenizer(options.tokenizer)
    state = recorded(model.history, "tokenizer") or {}
    files = ("tokenizer.json", "tokenizer_config.json")
    in_directory = model.path.is_dir() and any((model.path / name).is_file() for name in files)
    if in_directory and "characters" not in state:
        state = {"directory": str(model.path)}
    if state:
        try:
            return tokenizer_from_state(state)
        except MpocError:
            if options.path and recognise(options.path, options.format) in ("txt", "jsonl", "parquet"):
                raise
    return None


def _own_characters(data: Data, model: Model, trains: bool) -> Data:
    """Note that characters are numbered by their order in this text.

    Raises:
        MpocError: the network is measured, and was trained on other characters.
    """
    count, known = data.tokenizer.vocab_size if data.tokenizer else 0, _vocabulary(model)
    if not trains and known not in (None, count):
        raise MpocError(
            f"{data.path}: has {count} different characters, but the network {known}, without a record of "
            "their numbers",
            "measure it on the text it was trained on, or train it with mpoc finetune, which records them",
        )
    note = "characters are numbered by their order in this text: the network records no numbering"
    return replace(data, notes=(*data.notes, note))


def _shape(data: Data, model: Model) -> tuple[int, ...] | None:
    """Shape of one image as a network of the zoo takes it; None: unknown."""
    spec = model.zoo_spec
    return zoo.ENTRIES[zoo.parse(spec)[0]].shape if spec is not None and data.kind == "images" else None


def _with_classes(training_data: TrainingData, model: Model) -> TrainingData:
    """Number the classes as in training, else as in config.json, where the data name the same classes."""
    data = training_data.data
    if not data.classes or data.classes == tuple(map(str, range(len(data.classes)))):
        return training_data
    trained: dict[str, int] = recorded(model.history, "classes") or {}
    known = trained or getattr(getattr(model.network, "config", None), "label2id", None) or {}
    unknown = [name for name in data.classes if name not in known]
    if unknown:
        own = {name: number for number, name in enumerate(data.classes)}
        if trained:
            note = f"the network was trained on other classes, without {unknown[0]!r}: classes are renumbered"
            data = replace(data, notes=(*data.notes, note))
        return replace(training_data, data=data, classes=own, renumbered=bool(trained))
    numbers = [int(known[name]) for name in data.classes]
    if numbers == list(range(len(numbers))):
        return replace(training_data, classes=dict(known))
    where = "training" if trained else "the model's config.json"
    data = replace(data, notes=(*data.notes, f"classes are numbered as in {where}"))
    return replace(training_data, data=data, numbers=torch.tensor(numbers), classes=dict(known))


def _vocabulary(model: Model) -> int | None:
    """Number of tokens of the network; None: unknown, or it takes no text."""
    spec = model.zoo_spec
    if spec is not None:
        return zoo.parse(spec)[1].get("vocab")
    size = getattr(getattr(model.network, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _block(model: Model) -> int:
    """Tokens per example: the context of the network, at most ``_BLOCK`` where it is not of the zoo."""
    spec = model.zoo_spec
    if spec is not None:
        return zoo.parse(spec)[1].get("context", _BLOCK)
    longest = getattr(getattr(model.network, "config", None), "max_position_embeddings", None)
    return min(_BLOCK, longest) if isinstance(longest, int) and longest > 0 else _BLOCK


def choose_split(data: Data, wanted: str | None) -> str:
    """The split to measure on: ``wanted``, else the first there is of test, validation and train.

    Raises:
        UsageError: the data set has no such split.
    """
    if wanted is not None and wanted not in data.splits:
        raise UsageError(f"{data.path}: no split {wanted!r}, only {', '.join(data.splits)}")
    return wanted or next(name for name in ("test", "validation", "train") if name in data.splits)


def monitored_split(data: Data) -> str | None:
    """The split to measure during training: validation, else test, else none."""
    return next((name for name in ("validation", "test") if name in data.splits), None)
