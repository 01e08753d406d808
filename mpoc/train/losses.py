"""The losses of steps that nobody has looked at yet: looking makes a GPU wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpoc.errors import MpocError


class DivergedError(MpocError):
    """The loss is not finite."""


class Losses:
    """Of one step after another."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of this process
        self._counts: list[int] = []

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, summed: Tensor, count: int) -> None:
        """Those of one step: this process's sum (scalar), and how many all processes have together."""
        self._sums.append(summed)
        self._counts.append(count)

    def take(self, accelerator: Any, step: int, lr: Callable[[int], float]) -> list[float]:
        """The mean loss of each step, and forget them.

        Args:
            accelerator: of :func:`mpoc.train.engine.make_accelerator`.
            step: how many steps are done.
            lr: the learning rate of a step, counted from 0.

        Raises:
            DivergedError: one is not finite: with its step, learning rate and a hint.
        """
        sums = torch.stack(self._sums)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        means = [summed / count for summed, count in zip(sums.tolist(), self._counts, strict=True)]
        for k, loss in enumerate(means, start=step - len(means)):
            if not math.isfinite(loss):
                what = "nan" if math.isnan(loss) else "infinite"
                raise DivergedError(
                    f"the loss is {what} at step {k + 1} (learning rate {lr(k):.3g})",
                    "a smaller --lr, --warmup 0.1, or --clip 1",
                )
        self._sums, self._counts = [], []
        return means
