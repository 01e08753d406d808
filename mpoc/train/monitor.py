"""The training log: one JSON object a line. A resumed training goes on where its checkpoint was.

What is told of a training while it runs and when it is done, and to whom.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mpoc.train.tasks import Scores
from mpoc.train.training_checkpoint import CheckpointFile


class TrainingLog:
    """Appends lines to a file.

    Args:
        path: of the file; None writes nothing.
        position: bytes to keep of what is there, as a checkpoint noted them; 0 starts anew.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self._file = None
        if path is not None:
            self._path = path
            self._file = path.open("r+b" if position and path.exists() else "wb", buffering=0)
            self._file.truncate(min(position, os.fstat(self._file.fileno()).st_size))
            self._file.seek(0, os.SEEK_END)

    def write(self, **values: Any) -> None:
        """One line, with the file at once.

        Raises:
            OSError: of writing, with the file's name.
        """
        if self._file is None:
            return
        line = (json.dumps(values, ensure_ascii=False) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]  # less than all where a disk is nearly full
        except OSError as error:
            error.filename = str(self._path)
            raise

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class TrainingEvent:
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
class TrainingMonitor:
    """Who looks on: a log, a checkpoint file, a callback."""

    log: TrainingLog = field(default_factory=lambda: TrainingLog(None))
    checkpoint: CheckpointFile | None = None
    save_seconds: float = math.inf  # between checkpoints
    save_steps: int | None = None
    on_event: Callable[[TrainingEvent], None] | None = None
