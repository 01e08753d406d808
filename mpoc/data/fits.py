"""Whether a data set fits a network, asked before the first step."""

from __future__ import annotations

import torch

from mpoc.data.base import Data, Subset
from mpoc.data.images import ImageOptions
from mpoc.errors import MpocError


def check_fits(
    data: Data,
    classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    *,
    images: ImageOptions | None = None,
    vocabulary: int | None = None,
) -> None:
    """Stop where data and network disagree.

    Args:
        data: the set.
        classes: the network's outputs; None for a task without classes.
        shape: of one input as the network takes it, e.g. (3, 32, 32); None where any will do.
        images: what is done to images on the way (their size may change).
        vocabulary: the network's tokens; None where it takes no text.

    Raises:
        MpocError: labels the network has no output for, no labels, inputs of another shape, tokens it lacks.
    """
    if classes is not None:
        _check_classes(data, classes)
    if shape is not None and data.kind != "text":
        found = images.output_shape(data.shape) if images and data.kind == "images" else data.shape
        if found != tuple(shape):
            taken, given = ("×".join(map(str, sizes)) for sizes in (shape, found))
            resizable = data.kind == "images" and len(shape) == 3 and found[0] == shape[0]
            hint = f"resize: --size {shape[1]}x{shape[2]}" if resizable else None
            raise MpocError(f"{data.path}: examples are {given}, but the network takes {taken}", hint)
    if vocabulary is not None and data.tokenizer is not None and data.tokenizer.vocab_size > vocabulary:
        raise MpocError(
            f"{data.path}: its tokenizer has {data.tokenizer.vocab_size:,} tokens, "
            f"but the network {vocabulary:,}",
            "use the tokenizer the network was made with",
        )


def _check_classes(data: Data, classes: int) -> None:
    for split, examples in data.splits.items():
        y = examples.y
        if y is None or y.dtype != torch.int64:
            what = "no labels" if y is None else "regression targets, not labels"
            raise MpocError(f"{data.path}: {split} has {what}, but the network has {classes} classes")
        bad = torch.nonzero(y >= classes).flatten()
        if len(bad):
            label, row = int(y[bad[0]]), int(bad[0])
            if isinstance(examples, Subset):  # what was held out is of the training files too
                split, row = "train", int(examples.indices[row])
            raise MpocError(
                f"{data.path}: label {label} (class {data.classes[label]!r}; {split}, example {row}) "
                f"is out of range for a network of {classes} classes (0 to {classes - 1})",
                f"the set has {len(data.classes)} classes: give the network as many",
            )
