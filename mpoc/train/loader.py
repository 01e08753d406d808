"""Read the batches of a split in order, preprocess them, and read ahead where that helps.

The examples of a step are a pure function of seed and step, so that a resume needs no sampler state.
They are the same for any number of processes and of parts: the batch is cut into contiguous shares, one per
process, and each share into parts.  Texts of similar length go together, so that there is little padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.data import Examples, shuffled
from mpoc.data.text import TokenStream
from mpoc.models.call import Batch
from mpoc.runtime.device import derived_seed
from mpoc.train.tasks import Task

_WINDOW = 16  # batches among which lengths are sorted

# Preprocesses a batch, and augments it where a generator is given.
Transform = Callable[[Batch, torch.Generator | None], Batch]


class ExampleOrder:
    """The shuffled order of a training split.

    Args:
        examples: examples of the split.
        batch: examples per step, over all processes.
        parts: number of parts that a process computes its share in (gradient accumulation).
        rank: rank of this process.
        processes: their number.
        seed: seed of the shuffle.
    """

    def __init__(
        self, examples: Examples, batch: int, parts: int = 1, rank: int = 0, processes: int = 1, seed: int = 0
    ) -> None:
        self.examples = examples
        self.batch = min(batch, len(examples))
        self.parts, self.rank, self.processes, self.seed = parts, rank, processes, seed
        # The last, smaller batch of an epoch is used where every part gets as many examples as batch norm
        # needs.
        whole, rest = divmod(len(examples), self.batch)
        least = min(2, self.batch // (parts * processes))
        self.steps_per_epoch = whole + int(rest // (parts * processes) >= max(1, least))
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def steps(self, epochs: float) -> int:
        """Number of steps in ``epochs`` passes, rounded up."""
        return math.ceil(epochs * self.steps_per_epoch)

    def indices(self, step: int) -> list[Tensor]:
        """The examples of this process in step ``step`` (from 0), one (n,) int64 for each part."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._begin_epoch(epoch)
            order, lengths = shuffled(self.examples, generator), self.examples.lengths()
            if lengths is not None:
                order = by_length(order, lengths, self.batch, generator)
            self._epoch, self._permutation = epoch, order
        chosen = self._permutation[k * self.batch : (k + 1) * self.batch]
        share = cut(chosen, self.rank, self.processes)
        return [cut(share, part, self.parts) for part in range(self.parts)]

    def _begin_epoch(self, epoch: int) -> None:
        """Redraw examples that differ by epoch: the random blocks of a text."""
        if isinstance(self.examples, TokenStream):
            self.examples.set_epoch(epoch)


def by_length(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Sort each window of ``order`` into batches of similar length, in random order.

    Args:
        order: (n,) indices of examples.
        lengths: lengths of all examples.
        batch: examples per batch; the remainder of a window stays at its end.
        generator: draws the order of the batches.
    """
    pieces = []
    for window in order.split(_WINDOW * batch):
        count = len(window) // batch
        whole, rest = window[: count * batch], window[count * batch :]
        alike = whole[lengths[whole].argsort(stable=True)].view(count, batch)
        pieces += [alike[torch.randperm(count, generator=generator)].flatten(), rest]
    return torch.cat(pieces)


def cut(indices: Tensor, k: int, pieces: int) -> Tensor:
    """Piece ``k`` of ``pieces`` contiguous pieces of nearly equal size."""
    if pieces == 1:
        return indices
    count = len(indices)
    return indices[k * count // pieces : (k + 1) * count // pieces]


def plain(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """Convert ``x`` to float32 where it is pixels or of another floating dtype."""
    x = batch.get("x")
    if x is None or x.dtype not in (torch.uint8, torch.float64, torch.float16, torch.bfloat16):
        return batch
    return {**batch, "x": x.float()}


@dataclass(frozen=True)
class BatchLoader:
    """A split whose batches are preprocessed."""

    examples: Examples
    transform: Transform = plain

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The batch of these examples; augmented where a generator is given."""
        return self.transform(self.examples.batch(indices), generator)


class BatchReader:
    """Reads the batches of one process step by step; on an accelerator each during the step before.

    Random draws for a batch (augmentation, masks) are a function of seed, step and process.
    """

    def __init__(self, loader: BatchLoader, order: ExampleOrder, task: Task, ahead: bool) -> None:
        self._loader, self._order, self._task = loader, order, task
        self._generator = torch.Generator()
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._coming: tuple[int, Future[list[Batch]]] | None = None

    def take(self, step: int) -> list[Batch]:
        """The parts of step ``step`` (from 0), on the CPU."""
        if self._pool is None:
            return self._read(step)
        if self._coming is None or self._coming[0] != step:
            self._coming = (step, self._pool.submit(self._read, step))
        parts = self._coming[1].result()
        self._coming = (step + 1, self._pool.submit(self._read, step + 1))
        return parts

    def _read(self, step: int) -> list[Batch]:
        order = self._order
        generator = self._generator.manual_seed(derived_seed(order.seed, "draw", step, order.rank))
        parts = []
        for indices in order.indices(step):
            batch = self._task.prepare(self._loader.read(indices, generator), generator)
            if self._pool is not None:
                batch = {name: values.pin_memory() for name, values in batch.items()}
            parts.append(batch)
        return parts

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
