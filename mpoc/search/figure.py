"""The trials of a search as a picture: the metric over the size on disk."""

from __future__ import annotations

from pathlib import Path

from mpoc.search.smallest import Smallest
from mpoc.writer import staged

_UNITS = {"accuracy": " (%)", "agreement": " (%)"}


def draw_search(found: Smallest, picture: Path) -> None:
    """All trials, the chosen one ringed, beside the dense network and what may be lost."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    search, before, metric = found.search, found.before, found.before.metric
    dense, nbytes = before.scores[metric], found.done.manifest.source.nbytes
    chosen = search.chosen
    assert chosen is not None
    sign = -1 if before.higher_is_better else 1
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    trials = sorted(search.trials, key=lambda trial: trial.nbytes)
    axes.plot([t.nbytes for t in trials], [t.scores[metric] for t in trials], "C0.-", label="compressed")
    axes.plot(
        [chosen.nbytes], [chosen.scores[metric]], "o", ms=11, mfc="none", color="C3",
        label=f"chosen: --ratio {chosen.ratio:g}",
    )  # fmt: skip
    if nbytes is not None:
        axes.plot([nbytes], [dense], "D", color="0.25", label="dense")
    limit = dense + sign * search.max_drop
    axes.axhline(limit, color="0.6", lw=1, ls="--", label=f"dense {'−+'[sign > 0]} {search.max_drop:g}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("size on disk")
    axes.set_ylabel(f"{metric} on {before.data}, {before.split}{_UNITS.get(metric, '')}")
    axes.legend(fontsize="small")
    with staged(picture) as scratch:
        figure.savefig(scratch)
