"""Open a data set of any known format, hold out a validation split, and check that it fits a network.

A fingerprint of the files identifies the set: ``finetune`` records it, so that ``eval`` can measure the
examples that the training held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mpoc.data.array_files import (
    labels_of,
    open_cifar,
    open_idx,
    open_npy,
    open_npz,
    open_safetensors_data,
)
from mpoc.data.base import IN_MEMORY_BYTES, Data, DataSource, Examples, Subset
from mpoc.data.documents import StoredDocuments
from mpoc.data.images import ImageOptions, class_folders, open_image_folder
from mpoc.data.recognise import files_of, recognise
from mpoc.data.tables import open_jsonl, open_parquet
from mpoc.data.text import TextOptions, TokenStream, open_text
from mpoc.errors import MpocError

# Bytes that a fingerprint reads in all: a set of at most so many is read whole; of each file of a larger set
# an equal share is read, half at its beginning and half at its end.
READ_AT_MOST = 1 << 26

_READERS: dict[str, Callable[[DataSource], Data]] = {
    "idx": open_idx,
    "cifar-binary": open_cifar,
    "image-folder": open_image_folder,
    "npy": open_npy,
    "npz": open_npz,
    "safetensors": open_safetensors_data,
    "parquet": open_parquet,
    "jsonl": open_jsonl,
    "txt": open_text,
}


def hold_out(data: Data, share: float, seed: int) -> Data:
    """Split a share of ``train`` off as ``validation``; ``notes`` records it.

    Where examples have labels, each class gives its share, to within one example.  A token stream gives its
    end, so that random blocks of the rest do not overlap it.

    Args:
        data: a set with a training split and no validation split.
        share: between 0 and 1.
        seed: seed of the choice; the same seed chooses the same examples.

    Raises:
        MpocError: no training split, a validation split already, or nothing left on one side.
    """
    if "train" not in data.splits or "validation" in data.splits:
        raise MpocError(f"{data.path}: nothing to hold out: it has the splits {', '.join(data.splits)}")
    train = data.splits["train"]
    kept: Examples
    held: Examples
    note = f"no validation split: {share:.3g} of train held out"
    if isinstance(train, TokenStream):
        kept, held = train.cut(share) if 0 < share < 1 else (train, train.cut(0)[1])
        note += ", its end"
    else:
        labelled = train.y is not None and train.y.dtype == torch.int64
        classes = train.y if train.y is not None and labelled else torch.zeros(len(train), dtype=torch.int64)
        chosen = _choose(classes, share, seed)
        kept, held = (
            Subset(train, torch.nonzero(~chosen).flatten()),
            Subset(train, torch.nonzero(chosen).flatten()),
        )
        note += f" (seed {seed}{', by class' if labelled else ''})"
    if len(kept) == 0 or len(held) == 0:
        hint = "choose a shorter --block, or provide more text" if isinstance(train, TokenStream) else None
        raise MpocError(
            f"{data.path}: {share:.3g} of {len(train):,} training examples leaves a split empty", hint
        )
    splits = {"train": kept, "validation": held, **{k: v for k, v in data.splits.items() if k != "train"}}
    return replace(data, splits=splits, notes=(*data.notes, note))


def _choose(classes: Tensor, share: float, seed: int) -> Tensor:
    """(n,) bool: round(n · share) examples, the share of each class to within one; each class keeps one."""
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


def check_fits(
    data: Data,
    classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    *,
    images: ImageOptions | None = None,
    vocabulary: int | None = None,
) -> None:
    """Check that the network can take the data.

    Args:
        data: the set.
        classes: the network's outputs; None for a task without classes.
        shape: shape of one input as the network takes it, e.g. (3, 32, 32); None: unknown or any.
        images: how images are preprocessed, which may resize them.
        vocabulary: number of tokens of the network; None: unknown, or it takes no text.

    Raises:
        MpocError: missing labels or labels without an output, inputs of another shape, tokens out of range.
    """
    if classes is not None:
        _check_classes(data, classes)
    if shape is not None and data.kind != "text":
        actual = images.output_shape(data.shape) if images and data.kind == "images" else data.shape
        if actual != tuple(shape):
            taken, given = ("×".join(map(str, sizes)) for sizes in (shape, actual))
            resizable = data.kind == "images" and len(shape) == 3 and actual[0] == shape[0]
            hint = f"resize: --image-size {shape[1]}x{shape[2]}" if resizable else None
            raise MpocError(f"{data.path}: examples are {given}, but the network takes {taken}", hint)
    if vocabulary is not None:
        _check_vocabulary(data, vocabulary)


def _check_vocabulary(data: Data, vocabulary: int) -> None:
    stored = {id(examples): examples for examples in map(_all_examples, data.splits.values())}
    for examples in stored.values():
        if isinstance(examples, StoredDocuments):
            examples.check_vocabulary(vocabulary)
        elif data.tokenizer is not None and data.tokenizer.vocab_size > vocabulary:
            raise MpocError(
                f"{data.path}: its tokenizer has {data.tokenizer.vocab_size:,} tokens, "
                f"but the network {vocabulary:,}",
                "use the tokenizer the network was made with",
            )


def _all_examples(examples: Examples) -> Examples:
    """The split that a subset was taken from."""
    return _all_examples(examples.examples) if isinstance(examples, Subset) else examples


def _check_classes(data: Data, classes: int) -> None:
    for split, examples in data.splits.items():
        y = examples.y
        if y is None or y.dtype != torch.int64:
            kind = "no labels" if y is None else "regression targets, not labels"
            raise MpocError(f"{data.path}: {split} has {kind}, but the network has {classes} classes")
        bad = torch.nonzero(y >= classes).flatten()
        if len(bad):
            label, row = int(y[bad[0]]), int(bad[0])
            if isinstance(examples, Subset):  # held-out examples are of the training files too
                split, row = "train", int(examples.indices[row])
            raise MpocError(
                f"{data.path}: label {label} (class {data.classes[label]!r}; {split}, example {row}) "
                f"is out of range for a network of {classes} classes (0 to {classes - 1})",
                f"give the network the {len(data.classes)} classes of the data",
            )


def data_fingerprint(path: Path, form: str) -> str:
    """BLAKE2 digest of the files of a data set, 16 hexadecimal digits; the name of ``path`` does not count.

    Args:
        path: file or directory.
        form: its format.

    Raises:
        MpocError: no such files.
        OSError: reading failed.
    """
    files = sorted(_files(path, form))
    sizes = [file.stat().st_size for file in files]
    whole = sum(sizes) <= READ_AT_MOST
    hasher = hashlib.blake2b(digest_size=8)
    for file, size in zip(files, sizes, strict=True):
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        hasher.update(repr((name, size)).encode())
        hasher.update(_ends(file, size, size if whole else READ_AT_MOST // (2 * len(files))))
    return hasher.hexdigest()


def _files(path: Path, form: str) -> set[Path]:
    files = [file for held in files_of(path, form)[0].values() for file in held]
    if form == "image-folder":
        return {file for folder in files for held in class_folders(folder).values() for file in held}
    return set(files) | ({labels_of(file) for file in files} if form == "idx" else set())


def _ends(file: Path, size: int, count: int) -> bytes:
    """The first and the last ``count`` bytes; the whole file where these meet."""
    with file.open("rb") as content:
        if size <= 2 * count:
            return content.read()
        first = content.read(count)
        content.seek(size - count)
        return first + content.read(count)


def open_data(
    path: Path,
    format: str | None = None,
    *,
    text: TextOptions | None = None,
    size: tuple[int, int] | None = None,
    limit: int = IN_MEMORY_BYTES,
) -> Data:
    """Open and check a file or a directory of data.

    Args:
        path: a file, or a directory with ``train…``, ``validation…`` and ``test…`` in it.
        format: one of ``FORMATS``; None: recognised.
        text: how text becomes examples; None: blocks of 256 characters.
        size: (height, width) to resize encoded images to; needed where images differ in size.
        limit: bytes of decoded examples to hold in memory; a larger set is read from disk.

    Returns:
        The set, with every label, count and shape checked.

    Raises:
        UsageError: no such path, an unknown format, or several formats in the directory.
        MpocError: bad data, with the file and row.
    """
    form = recognise(path, format)
    files, notes = files_of(path, form)
    return _READERS[form](DataSource(path, files, tuple(notes), size, text, limit))
