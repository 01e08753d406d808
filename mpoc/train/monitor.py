"""Record and report a training: its log, its events while it runs, and its outcome.

The log has one JSON object per line.  A resumed training continues it at the position that its checkpoint
noted.
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
from mpoc.train.training_checkpoint import CheckpointFile, SavedTraining


class TrainingLog:
    """Appends JSON lines to a file.

    Args:
        path: path of the file; None writes nothing.
        position: bytes of the existing file to keep, as a checkpoint noted them; 0 starts a new log.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self._file = None
        if path is not None:
            self._path = path
            self._file = path.open("r+b" if position and path.exists() else "wb", buffering=0)
            self._file.truncate(min(position, os.fstat(self._file.fileno()).st_size))
            self._file.seek(0, os.SEEK_END)

    def write(self, **values: Any) -> None:
        """Write one line, unbuffered.

        Raises:
            OSError: writing failed; the error names the file.
        """
        if self._file is None:
            return
        line = (json.dumps(values, ensure_ascii=False) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]  # a nearly full disk takes a part
        except OSError as error:
            error.filename = str(self._path)
            raise

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of all lines of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class TrainingEvent:
    """The state of a training at one moment."""

    step: int
    steps: int
    epoch: float
    loss: float  # mean over the steps since the last event
    lr: float
    rate: float  # examples per second
    seconds_left: float
    scores: Scores | None = None  # of an evaluation that has just been made


OnEvent = Callable[[TrainingEvent], None] | None


@dataclass(frozen=True)
class Outcome:
    """A finished training; the network has ``weights``, unless it is sharded over processes."""

    weights: dict[str, Tensor]
    evaluations: list[dict[str, Any]]  # step, epoch, train_loss and scores; the first before any step
    chosen: dict[str, Any]  # the evaluation of ``weights``
    steps: int
    rate: float  # examples per second, evaluations not counted


@dataclass
class TrainingMonitor:
    """Log, checkpoints and callback of a training, and the checkpoint that it resumes."""

    log: TrainingLog = field(default_factory=lambda: TrainingLog(None))
    checkpoint: CheckpointFile | None = None
    save_seconds: float = math.inf  # between checkpoints
    save_steps: int | None = None
    on_event: OnEvent = None
    split: str = "validation"  # name of the split that is scored, for the log
    resume: SavedTraining | None = None  # continue from this checkpoint
