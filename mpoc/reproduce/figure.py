"""The papers' figures of a finished study: accuracy over D, or over the depth, and the convergence curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from mpoc.reproduce.cell import DENSE
from mpoc.reproduce.study import Reproduction, Row
from mpoc.writer import staged

_NAMES = {"ttsvd": "MPO-Net, from TT-SVD", "random": "MPO-Net, random start", DENSE: "dense"}
_COLOURS = {"ttsvd": "C0", "random": "C1", DENSE: "0.25"}


def draw_figures(done: Reproduction, folder: Path) -> list[Path]:
    """``NAME.svg``, accuracy over D or depth, and ``NAME-curves.svg``, accuracy over epochs."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for suffix, draw in (("", _draw_accuracy), ("-curves", _draw_curves)):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes, done)
        axes.set_title(f"{done.study.title}{' (quick: a smoke run)' if done.quick else ''}")
        axes.set_ylabel(f"accuracy on {done.material.measured} (%)")
        axes.legend(fontsize="small")
        target = folder / f"{done.study.name}{suffix}.svg"
        with staged(target) as scratch:
            figure.savefig(scratch)
        written.append(target)
    return written


def _draw_accuracy(axes: Any, done: Reproduction) -> None:
    """The dense line with its band, or points where each x has its own dense network."""
    over_parameters = done.study.axis == "parameters"
    over_bonds = over_parameters or (done.study.axis == "D" and any(row.bond for row in done.rows))
    if over_bonds:
        axes.set_xscale("log", base=10 if over_parameters else 2)
        if not over_parameters:
            bonds = sorted({row.bond for row in done.rows if row.bond})
            axes.set_xticks(bonds, [str(bond) for bond in bonds])
        for row in done.rows:
            if row.start == DENSE:
                _draw_band(axes, row)
    labels = list(dict.fromkeys(row.experiment.label for row in done.rows))
    for start, rows in _series(done).items():
        if start[0] == DENSE and over_bonds:
            continue
        xs = [_place(done, row, labels, over_bonds) for row in rows]
        pairs = [row.mean("final") for row in rows]
        errors = [sigma or 0.0 for _, sigma in pairs]
        label = _NAMES[start[0]] + (f", {start[1]}" if over_bonds and _variants(done) > 1 else "")
        colour = None if _variants(done) > 1 and over_bonds else _COLOURS[start[0]]
        axes.errorbar(xs, [mean for mean, _ in pairs], errors, fmt=".-", capsize=3, color=colour, label=label)
    names = {"D": "bond dimension D", "parameters": "parameters of the replaced layers"}
    axes.set_xlabel(names.get(done.study.axis, done.study.axis))
    if not over_bonds and done.study.axis == "D":
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("")


def _draw_band(axes: Any, row: Row) -> None:
    mean, sigma = row.mean("final")
    axes.axhline(mean, color=_COLOURS[DENSE], lw=1, label=f"dense, {row.experiment.label}")
    if sigma:
        axes.axhspan(mean - sigma, mean + sigma, color=_COLOURS[DENSE], alpha=0.15, lw=0)
    if row.experiment.dense.accuracy is not None:
        axes.axhline(row.experiment.dense.accuracy, color="0.6", lw=1, ls=":", label="dense, the paper's")


def _place(done: Reproduction, row: Row, labels: list[str], over_bonds: bool) -> float:
    """Where a row stands on the horizontal axis."""
    if done.study.axis == "parameters":
        return float(row.replaced)
    if over_bonds:
        return float(row.bond)
    return float(labels.index(row.experiment.label)) if done.study.axis == "D" else row.experiment.x


def _series(done: Reproduction) -> dict[tuple[str, str], list[Row]]:
    """Rows that are joined by a line: of one start and, over D or parameters, of one variant or series."""
    axis = done.study.axis
    over_variants = not any(row.bond for row in done.rows) or axis not in ("D", "parameters")
    found: dict[tuple[str, str], list[Row]] = {}
    for row in done.rows:
        series = row.experiment.series or row.experiment.label
        found.setdefault((row.start, "" if over_variants else series), []).append(row)
    if axis == "parameters":
        return {key: sorted(rows, key=lambda row: row.replaced) for key, rows in found.items()}
    return found


def _variants(done: Reproduction) -> int:
    return len({row.experiment.label for row in done.rows})


def _draw_curves(axes: Any, done: Reproduction) -> None:
    """Mean accuracy over the runs at every evaluation."""
    many = _variants(done) > 1
    pairs = list(dict.fromkeys((row.experiment.label, row.bond) for row in done.rows if row.start != DENSE))
    for row in done.rows:
        epochs = [point["epoch"] for point in row.results[0].curve]
        columns = zip(*([p["accuracy"] for p in result.curve] for result in row.results), strict=True)
        label = _NAMES[row.start] + (f", D = {row.bond}" if row.bond else "")
        label += f", {row.experiment.label}" if many else ""
        style = {"ttsvd": "-", "random": "--", DENSE: "-"}[row.start]
        colour = _COLOURS[DENSE]
        if row.start != DENSE:
            colour = f"C{pairs.index((row.experiment.label, row.bond)) % 10}"
        means = [statistics.fmean(column) for column in columns]
        axes.plot(epochs, means, style, color=colour, lw=1, label=label)
    axes.set_xlabel("epoch")
