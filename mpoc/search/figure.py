"""The trials of a search as a picture: the metric over the size on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpoc.writer import staged


@dataclass(frozen=True)
class SizeTrials:
    """Bytes on disk and the metric of several compressions of one network."""

    points: Sequence[tuple[int, float]]  # (bytes, metric), by size
    chosen: tuple[int, float]
    chosen_label: str
    dense: tuple[int | None, float]  # of the original; None: its size is not known
    limit: float  # of the metric
    limit_label: str
    metric: str  # with its unit and the data it is of


def draw_size_trials(trials: SizeTrials, picture: Path) -> None:
    """All trials, the chosen one ringed, beside the dense network and what may be lost."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*trials.points, strict=True), "C0.-", label="compressed")
    axes.plot(*trials.chosen, "o", ms=11, mfc="none", color="C3", label=trials.chosen_label)
    if trials.dense[0] is not None:
        axes.plot(*trials.dense, "D", color="0.25", label="dense")
    axes.axhline(trials.limit, color="0.6", lw=1, ls="--", label=trials.limit_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("size on disk")
    axes.set_ylabel(trials.metric)
    axes.legend(fontsize="small")
    with staged(picture) as scratch:
        figure.savefig(scratch)
