"""Device and processes of a compression, the callbacks for its progress, and how long it will take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from time import perf_counter

import torch

from mpoc.io.manifest import LayerRecord
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

# Record, seconds, layers finished, layers in all, share of the work finished.
LayerCallback = Callable[[LayerRecord, float, int, int, float], None]

_LOG = threading.Lock()
# Stages of a calibrated compression, as measured on networks of 0.3 to 110 million weights.
_READ = 2.2  # passes of the dense network over the data, as long as reading it with gradients
_RUN = 0.64  # as long as both networks run once, in front of the fits
_MOVED = 1 / 64  # of a pass, to see how far one layer moves the outputs
# Operations, by effort where that matters.
_PRODUCTS = 6.5  # a row and an input squared: inputs of both networks by themselves and by each other
_PRICED, _PRICED_EACH = 12, 1e10
_FITTED = {"fast": 25, "balanced": 200, "thorough": 800}  # applications of the metric, of a matrix
_CLOSED = 40  # of a kernel whose forms are two factors
_DECOMPOSED = 4  # an input to the third power
_EACH = 1e8  # of any layer
_MERA = 500  # applications, of a short descent of a MERA
_MERA_FITTED = 1.3  # times as long, the descents of its fit, which one thread makes
TRIALS = 2  # of ways to share a budget; others find what these have tried
_FEW, _WIDE = 2048, 8192  # rows as which moments of so many inputs are kept, at least
_SIDE, _TIMES = 768, 30  # of the product that is timed, until threads and clock are at full speed
LARGE_KERNEL = 1 << 18  # numbers of a kernel whose MERA would take minutes to fit


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
        """Report step ``number`` (from 1) of ``count`` of a stage, from any thread, of one at a time."""
        if self.progress.stage is not None:
            with _LOG:
                self.progress.stage(stage, number, count, self.later if self.fits_once else Later())


class Kind(Enum):
    """What a layer is to the work of its fit."""

    MATRIX, KERNEL, TABLE = range(3)


@dataclass(frozen=True)
class LayerWork:
    """What the calibrated fit of a layer computes with."""

    outputs: int  # N_y
    inputs: int  # N_x; rows of a table
    rows: float  # of inputs, in all examples
    kind: Kind

    def priced(self, effort: str) -> float:
        """Operations of pricing its forms."""
        decomposed = self._applied + self._moments() / 4
        return _PRICED * decomposed + _PRICED_EACH + self.tried(effort)

    def fitted(self, effort: str) -> float:
        """Operations of the fit: products of inputs, decompositions, and what is iterated."""
        rows = self.rows if self.inputs < _WIDE else min(self.rows, _FEW)
        products = 0.0 if self.kind is Kind.TABLE else _PRODUCTS * rows * self.inputs**2
        applications: float = _FITTED[effort]
        if self._is_mera(effort):
            applications = _MERA_FITTED * _MERA * torch.get_num_threads()
        elif self.kind is Kind.KERNEL and effort != "thorough":
            applications = _CLOSED
        return products + applications * self._applied + _DECOMPOSED * self._moments()

    def tried(self, effort: str) -> float:
        """Operations of the short descent by which a form is priced, or a way to share a budget is tried."""
        return _MERA * self._applied if self._is_mera(effort) else 0.0

    @property
    def _applied(self) -> float:
        """Of one application of the metric."""
        sides = self.outputs if self.kind is Kind.TABLE else self.outputs + self.inputs
        return self.outputs * self.inputs * sides + _EACH

    def _moments(self) -> float:
        """Of one decomposition of the moment of its inputs."""
        rows = min(self.inputs, _FEW) if self.inputs >= _WIDE else self.inputs
        return 0.0 if self.kind is Kind.TABLE else float(self.inputs**2 * rows)

    def _is_mera(self, effort: str) -> bool:
        """Whether its forms are MERAs."""
        is_small = self.outputs * self.inputs <= LARGE_KERNEL
        return self.kind is Kind.KERNEL and effort != "fast" and is_small


@dataclass(frozen=True)
class Workload:
    """The work of all fits of a calibrated compression, by the names of weights."""

    layers: dict[str, LayerWork]
    effort: str
    processes: int = 1
    again: Mapping[str, float] = field(default_factory=dict)  # by name, see :func:`runs_again`

    def after_reading(self) -> Later:
        """What follows the reading of the dense network: prices, trials and fits."""
        every = self.layers.values()
        operations = sum(one.priced(self.effort) + one.fitted(self.effort) for one in every)
        operations += TRIALS * sum(one.tried(self.effort) for one in every)
        passes = seconds_of_passes(1.0) * (1 + sum(self.again.values())) + _MOVED * len(self.layers)
        return Later(passes / _READ, self._seconds(operations))

    def after_pricing(self, one_pass: float) -> Later:
        """What follows the pricing of forms: how far each layer moves the outputs, trials, and the fits."""
        moved = _MOVED * len(self.layers) * one_pass / self.processes
        return Later(seconds=moved + self.fits(one_pass, trials=TRIALS).seconds)

    def fits(self, one_pass: float, names: Collection[str] | None = None, trials: int = 0) -> Later:
        """What the fits will take, and trials before them.

        Args:
            one_pass: seconds of a pass of the dense network.
            names: of the layers that are fitted; None: all.
            trials: of ways to share the budget.
        """
        names = self.layers if names is None else names
        tried = trials * sum(self.layers[name].tried(self.effort) for name in names)
        fitted = sum(self.seconds_of_fit(name, one_pass) for name in names)
        return Later(seconds=seconds_of_passes(one_pass) + self._seconds(tried) + fitted)

    def seconds_of_fit(self, name: str, one_pass: float) -> float:
        """Seconds of the fit of one layer, and of what runs again before it."""
        runs = seconds_of_passes(one_pass) * self.again.get(name, 0.0)
        return self._seconds(self.layers[name].fitted(self.effort)) + runs

    def _seconds(self, operations: float) -> float:
        return operations / _operations_per_second() / self.processes


def seconds_of_passes(one_pass: float) -> float:
    """Seconds in which both networks run once over the data, in front of the fits.

    Args:
        one_pass: seconds of a pass of the dense network over the data.
    """
    return _RUN * one_pass


def runs_again(groups: Sequence[Sequence[str]], piece_of: Callable[[str], object]) -> dict[str, float]:
    """By name: the share of the network that runs again before a layer, from the start of its piece.

    Args:
        groups: of layers of one input, in the network's order, each as long as any other.
        piece_of: what a layer's inputs are kept in front of.
    """
    begins: dict[object, int] = {}
    again: dict[str, float] = {}
    for k, group in enumerate(groups):
        first = begins.setdefault(piece_of(group[0]), k)
        again |= dict.fromkeys(group, (k - first) / len(groups) / len(group))
    return again


@cache
def _operations_per_second() -> float:
    """The speed of a product of float32 matrices, the best of some."""
    matrix = torch.ones(_SIDE, _SIDE)
    times = []
    for _ in range(_TIMES):
        start = perf_counter()
        matrix @ matrix
        times.append(perf_counter() - start)
    return 2 * _SIDE**3 / min(times)
