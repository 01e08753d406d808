"""What is told of a training while it runs and when it is done, and to whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mpoc.train.log import Log
from mpoc.train.state import Keeper
from mpoc.train.tasks import Scores


@dataclass(frozen=True)
class Told:
    """What is known while training runs."""

    step: int
    steps: int
    epoch: float
    loss: float  # mean of the steps since the last time
    lr: float
    rate: float  # examples a second
    seconds_left: float
    scores: Scores | None = None  # right after an evaluation


@dataclass(frozen=True)
class Outcome:
    """A training that is done; the network has ``weights``, unless it is sharded over processes."""

    weights: dict[str, Tensor]
    evaluations: list[dict[str, Any]]  # step, epoch, train_loss and scores; the first before any step
    chosen: dict[str, Any]  # the evaluation of ``weights``
    steps: int
    rate: float  # examples a second, evaluations not counted


@dataclass
class Watch:
    """Who looks on: a log, a checkpoint file, a callback."""

    log: Log = field(default_factory=lambda: Log(None))
    keeper: Keeper | None = None
    save_seconds: float = math.inf  # between checkpoints
    save_steps: int | None = None
    told: Callable[[Told], None] | None = None


def short(value: float) -> float:
    """Six significant digits: what logs and files keep."""
    return float(f"{value:.6g}")
