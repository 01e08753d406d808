"""The training log as a picture: loss and metric over epochs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, UsageError
from mpoc.plotting import require_matplotlib

_SUFFIXES = (".png", ".svg", ".pdf")
_METRICS = ("accuracy", "agreement", "cosine", "r2")  # the first that is known is drawn


def refuse_unknown_picture(path: Path) -> None:
    """Check, before any work, that a picture can be drawn there.

    Raises:
        UsageError: another suffix.
        MpocError: matplotlib is missing, or the directory.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--plot {path}: the name of a picture ends in {', '.join(_SUFFIXES)}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise MpocError(f"--plot {path}: there is no directory {folder}", f"mkdir -p {folder}")
    require_matplotlib()


def draw_curves(log: Iterable[dict[str, Any]], picture: Path) -> None:
    """Left the losses, right the metric of the measured split, one line a run.

    Args:
        log: the lines of a training log.
        picture: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    runs: list[list[dict[str, Any]]] = [[]]
    for line in log:
        if "run" in line and "step" not in line:
            runs += [[]] if runs[-1] else []
        elif "step" in line:
            runs[-1].append(line)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, lines in enumerate(runs):
        steps = [line for line in lines if "lr" in line]
        scored = [line for line in lines if "split" in line and "loss" in line and "epoch" in line]
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], f"C{k}", lw=0.7, label="training")
        left.plot([s["epoch"] for s in scored], [s["loss"] for s in scored], f"C{k}--", label="validation")
        name = next((n for n in _METRICS if scored and n in scored[0]), "loss")
        right.plot([s["epoch"] for s in scored], [s.get(name) for s in scored], f"C{k}.-")
        right.set_ylabel(name)
    left.set_xlabel("epoch")
    right.set_xlabel("epoch")
    left.set_ylabel("loss")
    left.legend(*(pair[:2] for pair in left.get_legend_handles_labels()))
    figure.savefig(picture)
