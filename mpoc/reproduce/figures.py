"""Draw the figures of a study: accuracy over D or depth, and over epochs.

For images as states, draw quality over stored numbers, entropy along the chain, and examples.
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


def draw_figures(results: Reproduction, folder: Path) -> list[Path]:
    """Draw ``NAME.svg``, accuracy over D or depth, and ``NAME-curves.svg``, accuracy over epochs."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for suffix, draw in (("", _draw_accuracy), ("-curves", _draw_curves)):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes, results)
        axes.set_title(f"{results.study.title}{' (quick: a smoke run)' if results.quick else ''}")
        axes.set_ylabel(f"accuracy on {results.material.measured} (%)")
        axes.legend(fontsize="small")
        target = folder / f"{results.study.name}{suffix}.svg"
        _save(figure, target)
        written.append(target)
    return written


def _draw_accuracy(axes: Any, results: Reproduction) -> None:
    """Accuracy with error bars; the dense network is a line with a band, or points if each x has its own."""
    over_parameters = results.study.axis == "parameters"
    over_bonds = over_parameters or (results.study.axis == "D" and any(row.bond for row in results.rows))
    if over_bonds:
        axes.set_xscale("log", base=10 if over_parameters else 2)
        if not over_parameters:
            bonds = sorted({row.bond for row in results.rows if row.bond})
            axes.set_xticks(bonds, [str(bond) for bond in bonds])
        for row in results.rows:
            if row.start == DENSE:
                _draw_band(axes, row)
    labels = list(dict.fromkeys(row.experiment.label for row in results.rows))
    for start, rows in _series(results).items():
        if start[0] == DENSE and over_bonds:
            continue
        xs = [_place(results, row, labels, over_bonds) for row in rows]
        pairs = [row.mean("final") for row in rows]
        errors = [sigma or 0.0 for _, sigma in pairs]
        label = _NAMES[start[0]] + (f", {start[1]}" if over_bonds and _variants(results) > 1 else "")
        colour = None if _variants(results) > 1 and over_bonds else _COLOURS[start[0]]
        axes.errorbar(xs, [mean for mean, _ in pairs], errors, fmt=".-", capsize=3, color=colour, label=label)
    names = {"D": "bond dimension D", "parameters": "parameters of the replaced layers"}
    axes.set_xlabel(names.get(results.study.axis, results.study.axis))
    if not over_bonds and results.study.axis == "D":
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("")


def _draw_band(axes: Any, row: Row) -> None:
    mean, sigma = row.mean("final")
    axes.axhline(mean, color=_COLOURS[DENSE], lw=1, label=f"dense, {row.experiment.label}")
    if sigma:
        axes.axhspan(mean - sigma, mean + sigma, color=_COLOURS[DENSE], alpha=0.15, lw=0)
    if row.experiment.dense.accuracy is not None:
        axes.axhline(row.experiment.dense.accuracy, color="0.6", lw=1, ls=":", label="dense, the paper's")


def _place(results: Reproduction, row: Row, labels: list[str], over_bonds: bool) -> float:
    """The position of a row on the horizontal axis."""
    if results.study.axis == "parameters":
        return float(row.replaced)
    if over_bonds:
        return float(row.bond)
    return float(labels.index(row.experiment.label)) if results.study.axis == "D" else row.experiment.x


def _series(results: Reproduction) -> dict[tuple[str, str], list[Row]]:
    """The rows joined by each line: one start and, over D or parameters, one variant or series."""
    axis = results.study.axis
    over_variants = not any(row.bond for row in results.rows) or axis not in ("D", "parameters")
    series_of: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        series = row.experiment.series or row.experiment.label
        series_of.setdefault((row.start, "" if over_variants else series), []).append(row)
    if axis == "parameters":
        return {key: sorted(rows, key=lambda row: row.replaced) for key, rows in series_of.items()}
    return series_of


def _variants(results: Reproduction) -> int:
    return len({row.experiment.label for row in results.rows})


def _draw_curves(axes: Any, results: Reproduction) -> None:
    """Draw the mean accuracy of the runs at every evaluation."""
    many = _variants(results) > 1
    pairs = list(
        dict.fromkeys((row.experiment.label, row.bond) for row in results.rows if row.start != DENSE)
    )
    for row in results.rows:
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


def draw_image_figures(study: ImageStates, folder: Path) -> list[Path]:
    """Draw ``mps-images.svg``, ``mps-images-entropy.svg`` and ``mps-images-examples.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    panels: list[tuple[str, Callable[[Any, ImageStates], None]]] = [
        ("", _draw_quality), ("-entropy", _draw_entropies), ("-examples", _draw_examples),
    ]  # fmt: skip
    return [_draw(study, folder / f"{NAME}{suffix}.svg", draw) for suffix, draw in panels]


def _draw(study: ImageStates, target: Path, draw: Callable[[Any, ImageStates], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure, study)
    few = " (quick: few images)" if study.quick else ""
    figure.suptitle(f"{study.data.path.name}, {len(study.images):,} images{few}", fontsize="medium")
    _save(figure, target)
    return target


def _draw_quality(figure: Any, study: ImageStates) -> None:
    axes = figure.subplots()
    for name, qualities in {**study.states, **study.peers}.items():
        points = {at.numbers / study.pixels: at.decibels for at in qualities if at.kept}
        axes.plot([*points], [*points.values()], _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xscale("log")
    axes.axvline(1, color="0.6", lw=1, ls=":")
    axes.set_xlabel("numbers stored / numbers of the image")
    axes.set_ylabel("peak signal-to-noise, mean (dB)")
    axes.legend(fontsize="small")


def _draw_entropies(figure: Any, study: ImageStates) -> None:
    axes = figure.subplots()
    for name, values in study.entropies.items():
        axes.plot(range(1, len(values) + 1), values, _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xticks(range(1, len(next(iter(study.entropies.values()))) + 1))
    axes.set_xlabel("bond, from the coarsest site to the finest")
    axes.set_ylabel("entanglement entropy, mean")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _draw_examples(figure: Any, study: ImageStates) -> None:
    """Draw the first images, and their states at every second bond that compresses, in both orders."""
    x = study.images[:_SHOWN]
    states = [at for at in study.states["morton"] if at.numbers < study.pixels][1::2]
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
