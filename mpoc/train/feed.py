"""Batches of a split as the network takes them: read, transformed, and ahead of time where that helps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.data import Examples
from mpoc.train.call import Batch
from mpoc.train.order import Order
from mpoc.train.settings import derived_seed
from mpoc.train.tasks import Task

Transform = Callable[[Batch, torch.Generator | None], Batch]
"""Normalises a batch, and augments it where a generator is given."""


def plain(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """No transform but float32 for ``x`` that are pixels or of another floating dtype."""
    x = batch.get("x")
    if x is None or x.dtype not in (torch.uint8, torch.float64, torch.float16, torch.bfloat16):
        return batch
    return {**batch, "x": x.float()}


@dataclass(frozen=True)
class Feed:
    """A split, and what becomes of its batches."""

    examples: Examples
    transform: Transform = plain

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The batch of these examples; augmented where a generator is given."""
        return self.transform(self.examples.batch(indices), generator)


class Reader:
    """The batches of one process, step by step; on an accelerator each is read during the step before.

    What is drawn for a batch (augmentation, masks) is a function of seed, step and process.
    """

    def __init__(self, feed: Feed, order: Order, task: Task, ahead: bool) -> None:
        self._feed, self._order, self._task = feed, order, task
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
            batch = self._task.prepare(self._feed.read(indices, generator), generator)
            if self._pool is not None:
                batch = {name: values.pin_memory() for name, values in batch.items()}
            parts.append(batch)
        return parts

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
