"""The device and the processes of a compression, and the callbacks for its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mpoc.io.manifest import LayerRecord
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

# Record, seconds, layers finished, layers in all, share of the work finished.
LayerCallback = Callable[[LayerRecord, float, int, int, float], None]

# What goes on, the number of this step, steps in all.
StageCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Progress:
    """Callbacks of a compression."""

    layer: LayerCallback | None = None  # after each layer
    stage: StageCallback | None = None  # at each step of the work that no single layer stands for


@dataclass(frozen=True)
class RunContext:
    """The device, the processes and the callbacks of one run, handed to all that it calls."""

    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS
    progress: Progress = field(default_factory=Progress)

    def log(self, stage: str, number: int, count: int) -> None:
        """Report step ``number`` (from 1) of ``count`` of a stage."""
        if self.progress.stage is not None:
            self.progress.stage(stage, number, count)
