"""Device and processes of a compression, the callbacks for its progress, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch

from mpoc.io.manifest import LayerRecord
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

# Record, seconds, layers finished, layers in all, share of the work finished.
LayerCallback = Callable[[LayerRecord, float, int, int, float], None]

# Stages of a calibrated compression, as measured on networks of 0.3 to 110 million weights: what pricing the
# forms and what the fits take beside reading the dense network, and their operations by effort, in units of
# :func:`fit_operations`.  Pricing forms of kernels fits some of them.
_PRICES, _FITS = 0.35, 1.1
_PRICED, _PRICED_KERNELS = 10, {"fast": 10, "balanced": 350, "thorough": 350}
_FITTED = {"fast": 55, "balanced": 150, "thorough": 600}
_PASSES = 4.5  # of the dense network, as long as the fits' passes: both networks run, and rows are multiplied
_EACH, _KERNEL = 1e8, 3e8  # of any fit: passes over the data, and of a kernel the many steps of a MERA
_FEW = 2048  # rows as which moments of very wide inputs are kept, at least
_WIDE = 8192
_SIDE = 768  # of the product that is timed


@dataclass(frozen=True)
class Later:
    """What follows a stage: so many times as long as it takes itself, and so many seconds."""

    times: float = 0.0
    seconds: float = 0.0


# What goes on, the number of this step, steps in all, what follows the stage.
StageCallback = Callable[[str, int, int, Later], None]


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
    later: Later = Later()  # than the stage that is reported
    fits_once: bool = True  # False: fits do not follow, or follow several times, and nothing is said of them

    def log(self, stage: str, number: int, count: int) -> None:
        """Report step ``number`` (from 1) of ``count`` of a stage."""
        if self.progress.stage is not None:
            self.progress.stage(stage, number, count, self.later if self.fits_once else Later())


def fit_operations(outputs: int, inputs: int, table: bool = False, kernel: bool = False) -> float:
    """Operations of a calibrated fit, to a factor: applying the metric, and decomposing moments of inputs.

    Args:
        outputs: N_y.
        inputs: N_x.
        table: whether it is an embedding, whose rows do not depend on others.
        kernel: whether it is a convolution's.
    """
    sides = inputs if table else outputs + inputs
    rows = inputs if inputs < _WIDE else _FEW
    return outputs * inputs * sides + inputs**2 * rows / 4 + (_KERNEL if kernel else _EACH)


@dataclass(frozen=True)
class Workload:
    """The operations of all fits of a calibrated compression, by :func:`fit_operations`."""

    linear: float
    kernels: float
    effort: str

    @property
    def operations(self) -> float:
        """Of all fits."""
        return self.linear + self.kernels

    def after_reading(self, processes: int = 1) -> Later:
        """What follows the reading of the dense network: prices and fits."""
        priced = _PRICED * self.linear + _PRICED_KERNELS[self.effort] * self.kernels
        fitted = _FITTED[self.effort] * self.operations
        return Later(_PRICES + _FITS, (priced + fitted) / _operations_per_second() / processes)


def seconds_of_fits(operations: float, one_pass: float, effort: str, processes: int = 1) -> float:
    """Seconds of calibrated fits; on networks of 0.3 to 110 million weights within a factor of two.

    Args:
        operations: of all of them, by :func:`fit_operations`.
        one_pass: seconds of a pass of the dense network over the data.
        effort: as a recipe names it.
        processes: number of them.
    """
    return _PASSES * one_pass + _FITTED[effort] * operations / _operations_per_second() / processes


def _operations_per_second() -> float:
    """The speed of a product of float32 matrices, the best of some."""
    matrix = torch.ones(_SIDE, _SIDE)
    times = []
    for _ in range(4):
        start = perf_counter()
        matrix @ matrix
        times.append(perf_counter() - start)
    return 2 * _SIDE**3 / min(times)
