"""The interface of a data set: splits of examples, read a batch at a time, whatever files they came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from mpoc.data.text import TextOptions, Tokenizer

Batch = dict[str, Tensor]

# A set whose decoded examples take at most this many bytes is decoded once and kept in memory; a larger one
# is read from disk, batch by batch.
IN_MEMORY_BYTES = 2 * 1024**3
# Row groups that a shuffled pass draws from at a time; they are cached while it does.
CHUNKS_AT_ONCE = 4


class Examples(Dataset[Batch], ABC):
    """One split: a map-style data set that reads a whole batch at once.

    For a ``DataLoader`` give ``collate_fn=lambda batch: batch``: ``__getitems__`` already returns the batch.
    """

    y: Tensor | None = None  # (n,) int64 labels or (n, …) float32 targets, always in memory

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """These examples: ``x`` (n, …), or ``input_ids`` and ``attention_mask`` (n, T); ``y`` if known."""

    def check(self) -> None:
        """Read what is read only when a batch asks for it, as far as it can stay in memory.

        Raises:
            MpocError: an example is damaged.
        """

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.batch(indices)

    def lengths(self) -> Tensor | None:
        """(n,) int64: tokens of each example; None where all are of one length or it is unknown."""
        return None

    def chunks(self) -> Tensor | None:
        """(n,) the chunk of the file that holds each example; None where any order costs the same."""
        return None


class Subset(Examples):
    """Some examples of a split, in the order given."""

    def __init__(self, examples: Examples, indices: Tensor) -> None:
        self.examples = examples
        self.indices = indices  # (n,) int64
        self.y = None if examples.y is None else examples.y[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """These examples, counted within the subset."""
        return self.examples.batch(self.indices[torch.as_tensor(indices, dtype=torch.int64)])

    def chunks(self) -> Tensor | None:
        """(n,) the chunk of each example of the subset, or None."""
        chunks = self.examples.chunks()
        return None if chunks is None else chunks[self.indices]

    def check(self) -> None:
        """Read all of the split that the subset is of."""
        self.examples.check()

    def lengths(self) -> Tensor | None:
        """(n,) tokens of each example of the subset, or None."""
        lengths = self.examples.lengths()
        return None if lengths is None else lengths[self.indices]


def shuffled(examples: Examples, generator: torch.Generator) -> Tensor:
    """(n,) int64: a random order of the examples, adapted to how they are stored.

    Where they lie in chunks that must be read whole (the row groups of a large parquet file), the chunks
    come in random order, ``CHUNKS_AT_ONCE`` at a time, and their examples are mixed.
    """
    order = torch.randperm(len(examples), generator=generator)
    chunks = examples.chunks()
    if chunks is None:
        return order
    rank = torch.randperm(int(chunks.max()) + 1, generator=generator)
    window = rank[chunks[order]] // CHUNKS_AT_ONCE
    return order[torch.argsort(window, stable=True)]


@dataclass(frozen=True)
class Data:
    """A checked data set; its examples are read through :meth:`Examples.batch`."""

    path: Path  # as the user named it
    format: str  # one of mpoc.data.FORMATS
    kind: str  # "images": x uint8 (n, C, H, W); "arrays": x as stored; "text": input_ids, attention_mask
    splits: dict[str, Examples]  # of "train", "validation", "test" those the set has
    classes: tuple[str, ...]  # names of the labels 0, 1, …; () for regression and where there are no labels
    shape: tuple[int, ...]  # of one sample, e.g. (3, 32, 32); () for text
    notes: tuple[str, ...] = ()  # what the user should know about the reading, a line each
    tokenizer: Tokenizer | None = None  # of a text set; None where its files hold token ids

    def announce(self) -> str:
        """One line: format, splits with their counts, shape, classes."""
        counts = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        parts = [f"{self.path}: {self.format}", counts]
        if self.kind == "text":
            parts.append(f"vocabulary {self.tokenizer.vocab_size:,}" if self.tokenizer else "token ids")
        else:
            parts.append(f"{self.kind} {'×'.join(map(str, self.shape)) or 'scalar'}")
        if self.classes:
            shown = ", ".join(self.classes[:3]) + (", …" if len(self.classes) > 3 else "")
            parts.append(f"{len(self.classes)} classes ({shown})")
        return "; ".join(parts)


@dataclass(frozen=True)
class DataSource:
    """The files of each split, and how a reader should read them."""

    path: Path  # as the user named it
    files: dict[str, list[Path]]  # split → files, both in reading order
    notes: tuple[str, ...]
    size: tuple[int, int] | None  # (height, width) to resize encoded images to; None: as they are
    text: TextOptions | None
    limit: int  # bytes to hold in memory, see IN_MEMORY_BYTES
