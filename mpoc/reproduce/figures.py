"""Figures of a finished study: accuracy over D or depth, and accuracy over epochs.

For images as states: quality over stored numbers, entropy along the chain, and examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpoc.io.atomic import staged
from mpoc.reproduce.image_states import NAME, ORDERS, ImageStates, approximate
from mpoc.reproduce.run import DENSE
from mpoc.reproduce.study import Reproduction, Row

_NAMES = {"ttsvd": "MPO-Net, from TT-SVD", "random": "MPO-Net, random start", DENSE: "dense"}
_COLOURS = {"ttsvd": "C0", "random": "C1", DENSE: "0.25"}

METHODS = {
    **{order: f"state, {name}" for order, name in ORDERS.items()},
    "svd": "SVD",
    "dct-own": "DCT, own places",
    "dct-common": "DCT, common places",
}
_STYLES = {"morton": "C0.-", "raster": "C1.-", "svd": "0.25", "dct-own": "C2", "dct-common": "C2--"}
_SHOWN = 8  # images


def draw_figures(done: Reproduction, folder: Path) -> list[Path]:
    """Draw ``NAME.svg``, accuracy over D or depth, and ``NAME-curves.svg``, accuracy over epochs."""
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
        _save(figure, target)
        written.append(target)
    return written


def _draw_accuracy(axes: Any, done: Reproduction) -> None:
    """The dense network as a line with its band, or as points where each x has its own."""
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
    """Position of a row on the horizontal axis."""
    if done.study.axis == "parameters":
        return float(row.replaced)
    if over_bonds:
        return float(row.bond)
    return float(labels.index(row.experiment.label)) if done.study.axis == "D" else row.experiment.x


def _series(done: Reproduction) -> dict[tuple[str, str], list[Row]]:
    """Rows joined by a line: of one start and, over D or parameters, of one variant or series."""
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


def draw_image_figures(done: ImageStates, folder: Path) -> list[Path]:
    """Draw ``mps-images.svg``, ``mps-images-entropy.svg`` and ``mps-images-examples.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    panels: list[tuple[str, Callable[[Any, ImageStates], None]]] = [
        ("", _draw_quality), ("-entropy", _draw_entropies), ("-examples", _draw_examples),
    ]  # fmt: skip
    return [_draw(done, folder / f"{NAME}{suffix}.svg", draw) for suffix, draw in panels]


def _draw(done: ImageStates, target: Path, draw: Callable[[Any, ImageStates], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure, done)
    few = " (quick: few images)" if done.quick else ""
    figure.suptitle(f"{done.data.path.name}, {len(done.images):,} images{few}", fontsize="medium")
    _save(figure, target)
    return target


def _draw_quality(figure: Any, done: ImageStates) -> None:
    axes = figure.subplots()
    for name, found in {**done.states, **done.peers}.items():
        points = {at.numbers / done.pixels: at.decibels for at in found if at.kept}
        axes.plot([*points], [*points.values()], _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xscale("log")
    axes.axvline(1, color="0.6", lw=1, ls=":")
    axes.set_xlabel("numbers stored / numbers of the image")
    axes.set_ylabel("peak signal-to-noise, mean (dB)")
    axes.legend(fontsize="small")


def _draw_entropies(figure: Any, done: ImageStates) -> None:
    axes = figure.subplots()
    for name, values in done.entropies.items():
        axes.plot(range(1, len(values) + 1), values, _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xticks(range(1, len(next(iter(done.entropies.values()))) + 1))
    axes.set_xlabel("bond, from the coarsest site to the finest")
    axes.set_ylabel("entanglement entropy, mean")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _draw_examples(figure: Any, done: ImageStates) -> None:
    """The first images, and their states at every second bond that compresses, in both orders."""
    x = done.images[:_SHOWN]
    states = [at for at in done.states["morton"] if at.numbers < done.pixels][1::2]
    rows = [("image", x)]
    for order in ORDERS:
        rows += [(f"{ORDERS[order]}, D = {at.kept}", approximate(x, order, at.kept)[0]) for at in states]
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for line, (label, images) in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")


def _save(figure: Any, target: Path) -> None:
    with staged(target) as scratch:
        figure.savefig(scratch)
