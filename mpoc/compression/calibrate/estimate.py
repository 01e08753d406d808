"""Estimate the time and memory of calibrated fits before they are run, for ``--dry-run``.

The passes over the data are priced by the one over the held-out examples, which was timed; the fits by the
operations of their shapes and the speed of a product of matrices on this machine.  Measured on networks of
0.3 to 11 million weights, the sum is within a factor of two.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from mpoc.compression.calibrate.sequential import Schedule
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import DEFAULT_EFFORT
from mpoc.runtime.formatting import human_bytes

# Both networks run, parts of them twice, and two more products of rows are summed.
_PASSES = 4.5  # over the dense network
# Operations of a fit, for each unit of :meth:`Schedule.costs`.
_OPERATIONS = {"fast": 55, "balanced": 400, "thorough": 1600}
_MATRICES = 18  # of a layer's wider side, in float64, that its fit holds at a time
_SIDE = 768  # of the product that is timed


@dataclass(frozen=True)
class Estimate:
    """What the fits of a calibrated compression will need."""

    seconds: float
    memory: int  # bytes, the largest of the whole run
    scratch: int  # bytes of its files beside the output, or in the folder of --scratch

    @property
    def note(self) -> str:
        """One line for the user."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"the fits would take about {minutes}:{seconds:02d} minutes; the run about "
            f"{human_bytes(self.memory)} of memory and {human_bytes(self.scratch)} of files meanwhile"
        )


def estimate(
    statistics: CalibrationStatistics, schedule: Schedule, plans: Sequence[LayerPlan], effort: str | None
) -> Estimate:
    """Estimate what the fits of these plans need, once the dense network was measured."""
    fits = sum(schedule.costs(plans).values()) * _OPERATIONS[effort or DEFAULT_EFFORT]
    seconds = statistics.pass_seconds * _PASSES + fits / _operations_per_second()
    shapes = (plan.structure.as_low_rank() for plan in plans if plan.map.name in schedule.observed)
    widest = max(
        (max(one.outputs, one.lead * one.inputs) for one in shapes if one.kind != "embedding"), default=0
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak += _MATRICES * 8 * widest**2
    if not statistics.scratch.is_required:  # memory held what the run will have in files
        peak -= statistics.scratch.nbytes
    found = sum(4 * plan.structure.num_original for plan in plans)  # the compressed network's own weights
    return Estimate(seconds, peak, statistics.scratch_bytes + found)


def _operations_per_second() -> float:
    """The speed of a product of float32 matrices, the best of some."""
    matrix = torch.ones(_SIDE, _SIDE)
    times = []
    for _ in range(4):
        start = perf_counter()
        matrix @ matrix
        times.append(perf_counter() - start)
    return 2 * _SIDE**3 / min(times)
