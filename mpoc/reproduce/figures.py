"""Draw the figures of a study, accuracy over D or depth and over epochs, and one page of all tables.

For images as states, draw quality over stored numbers, entropy along the chain, and examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpoc.io.atomic import staged, write_text
from mpoc.reporting.charts import Axis, Chart, Series, tone_of
from mpoc.reporting.html import document
from mpoc.reporting.html_sections import figures, scrolled, title_of
from mpoc.reporting.svg import Markup, join, tag
from mpoc.reproduce.all_tables import PLAN_COLUMNS, PlannedTable, plan_rows
from mpoc.reproduce.experiment import CONTROL, DENSE, DENSE_STARTS, FROM_DENSE, RANDOM, RESCALED, TTSVD
from mpoc.reproduce.image_states import NAME, ORDERS, SOURCE, ImageStates, approximate
from mpoc.reproduce.study import Reproduction, Row, notes_of, table_of

_NAMES = {
    TTSVD: "MPO-Net, from TT-SVD",
    RESCALED: "MPO-Net, from TT-SVD rescaled",
    RANDOM: "MPO-Net, random start",
    DENSE: "dense",
    CONTROL: "dense, control",
}
_COLOURS = {TTSVD: "C0", RESCALED: "C2", RANDOM: "C1", DENSE: "0.25", CONTROL: "0.5"}
_STROKES = {TTSVD: "-", RESCALED: "-.", RANDOM: "--", DENSE: "-", CONTROL: "--"}

METHODS = {
    **{order: f"state, {name}" for order, name in ORDERS.items()},
    "svd": "SVD",
    "dct-own": "DCT, own places",
    "dct-common": "DCT, common places",
}
_STYLES = {"morton": "C0.-", "raster": "C1.-", "svd": "0.25", "dct-own": "C2", "dct-common": "C2--"}
_SHOWN = 8  # images
_TONES, _MOST_CURVES = 6, 12  # of a chart on the page


def draw_figures(results: Reproduction, folder: Path) -> list[Path]:
    """Draw ``NAME.svg``, accuracy over D or depth, and ``NAME-curves.svg``, accuracy over epochs."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for suffix, draw in (("", _draw_accuracy), ("-curves", _draw_curves)):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes, results)
        words = "quick: a smoke run" if results.quick else f"shortened: {results.shortened}"
        axes.set_title(results.study.title + (f" ({words})" if results.shortened else ""))
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
            if row.start in DENSE_STARTS:
                _draw_band(axes, row)
    labels = list(dict.fromkeys(row.experiment.label for row in results.rows))
    for start, rows in _series(results).items():
        if start[0] in DENSE_STARTS and over_bonds:
            continue
        xs = [_place(results, row, labels, over_bonds) for row in rows]
        pairs = [row.mean("final") for row in rows]
        errors = [sigma or 0.0 for _, sigma in pairs]
        variant = start[1] if _variants(results) > 1 or not over_bonds else ""
        label = ", ".join(filter(None, (_NAMES[start[0]], variant)))
        colour = None if _variants(results) > 1 and over_bonds else _COLOURS[start[0]]
        axes.errorbar(xs, [mean for mean, _ in pairs], errors, fmt=".-", capsize=3, color=colour, label=label)
    names = {"D": "bond dimension D", "parameters": "parameters of the replaced layers"}
    axes.set_xlabel(names.get(results.study.axis, results.study.axis))
    if not over_bonds and results.study.axis == "D":
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("")


def _draw_band(axes: Any, row: Row) -> None:
    mean, sigma = row.mean("final")
    colour = _COLOURS[row.start]
    label = f"{_NAMES[row.start]}, {row.experiment.label}"
    axes.axhline(mean, color=colour, lw=1, ls=_STROKES[row.start], label=label)
    if sigma:
        axes.axhspan(mean - sigma, mean + sigma, color=colour, alpha=0.15, lw=0)
    if row.start == DENSE and row.experiment.dense.accuracy is not None:
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
        series = row.experiment.series if over_variants else row.experiment.series or row.experiment.label
        series_of.setdefault((row.start, series), []).append(row)
    if axis == "parameters":
        return {key: sorted(rows, key=lambda row: row.replaced) for key, rows in series_of.items()}
    return series_of


def _variants(results: Reproduction) -> int:
    return len({row.experiment.label for row in results.rows})


def _draw_curves(axes: Any, results: Reproduction) -> None:
    """Draw the mean accuracy of the runs at every evaluation."""
    many = _variants(results) > 1
    pairs = list(
        dict.fromkeys(
            (row.experiment.label, row.bond) for row in results.rows if row.start not in DENSE_STARTS
        )
    )
    for row in results.rows:
        before = _behind(results, row)
        epochs = [before + point["epoch"] for point in row.results[0].curve]
        columns = zip(*([p["accuracy"] for p in result.curve] for result in row.results), strict=True)
        label = _NAMES[row.start] + (f", D = {row.bond}" if row.bond else "")
        label += f", {row.experiment.label}" if many else ""
        style, colour = _STROKES[row.start], _COLOURS[row.start]
        if row.start not in DENSE_STARTS:
            colour = f"C{pairs.index((row.experiment.label, row.bond)) % 10}"
        means = [statistics.fmean(column) for column in columns]
        axes.plot(epochs, means, style, color=colour, lw=1, label=label)
    axes.set_xlabel("epoch")


def _behind(results: Reproduction, row: Row) -> float:
    """The epochs of the dense network that a start from it goes on with, where both divide a training."""
    if row.start not in FROM_DENSE or not row.experiment.training.control:
        return 0.0
    network = row.experiment.network
    origins = (r for r in results.rows if r.start == DENSE and r.experiment.network == network)
    return max((origin.results[0].curve[-1]["epoch"] for origin in origins), default=0.0)


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


def image_table(study: ImageStates) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of images as states."""
    titles = ["D", "numbers", "share", *(f"{METHODS[name]} dB" for name in (*study.states, *study.peers))]
    columns = [*study.states.values(), *study.peers.values()]
    rows = []
    for k, at in enumerate(columns[0]):
        decibels = (f"{column[k].decibels:.2f}" if column[k].kept else "–" for column in columns)
        rows.append([str(at.kept), f"{at.numbers:,}", f"{at.numbers / study.pixels:.3f}", *decibels])
    return titles, rows


def image_notes(study: ImageStates) -> list[str]:
    """The entropies, and how the numbers of the table are made, line by line."""
    lines = []
    for order, values in study.entropies.items():
        shown = " ".join(f"{value:.3f}" for value in values)
        lines.append(f"entanglement entropy, {ORDERS[order]}, bonds 1 to {len(values)}: {shown}")
    shape = "×".join(map(str, study.images.shape[1:]))
    colour = "a site of 3 colours in front of " if study.images.shape[1] == 3 else ""
    return [
        *lines,
        f"{len(study.images):,} images of {shape} ({study.split}), as {colour}sites of 4, coarse to fine; "
        "errors on the image's own pixels",
        "dB: mean over the images of 10 log₁₀(1/mean squared error), peak 1; an error below that of 8-bit "
        "pixels counts as theirs, 58.9 dB",
        "numbers of a state are its cores'; of rank r of a matrix (colours and rows, columns) its two "
        "factors'; of a cosine coefficient its value, at a place of its own its place too",
        f"source: {SOURCE}",
    ]


def write_page(
    path: Path, plan: Sequence[PlannedTable], results: Sequence[Reproduction | ImageStates]
) -> None:
    """Write the tables and figures of finished studies, and the plan of all, as one page that loads nothing.

    Args:
        path: the HTML file; it appears complete or not at all.
        plan: of all tables.
        results: of those that are finished, in the order of the plan.
    """
    finished = f"{len(results)} of {len(plan)} tables finished"
    body = tag(
        "main",
        tag("p", "mpoc reproduce all", class_="kind"),
        tag("h1", "The papers' tables"),
        tag("p", f"{finished}. A training shorter than the paper's is called shortened.", class_="headline"),
        tag("h2", "Plan"),
        _html_table("plan", list(PLAN_COLUMNS), plan_rows(plan)),
        *(_image_section(each) if isinstance(each, ImageStates) else _section(each) for each in results),
    )
    write_text(path, document("The papers' tables: mpoc reproduce all", body))


def _section(results: Reproduction) -> Markup:
    """Table, notes and figures of a study."""
    charts = [_accuracy_chart(results)]
    if len(results.rows) <= _MOST_CURVES:
        charts.append(_curves_chart(results))
    return join(
        title_of(f"{results.study.title}: {results.study.source}", results.study.name),
        _html_table(results.study.name, *table_of(results)),
        tag("ul", *(tag("li", line) for line in notes_of(results)), class_="remarks"),
        figures(charts),
    )


def _image_section(study: ImageStates) -> Markup:
    named = {**study.states, **study.peers}
    lines = tuple(
        Series(
            METHODS[name],
            tuple((at.numbers / study.pixels, at.decibels) for at in qualities if at.kept),
            "marked line" if name in study.states else "line",
            tone_of(k),
        )
        for k, (name, qualities) in enumerate(named.items(), 1)
    )
    share = Axis("numbers stored / numbers of the image", "log")
    chart = Chart("Quality", "Mean peak signal-to-noise of the images.", share, Axis("dB"), lines)
    return join(
        title_of(f"Images as matrix product states: {SOURCE}", NAME),
        _html_table(NAME, *image_table(study)),
        tag("ul", *(tag("li", line) for line in image_notes(study)), class_="remarks"),
        figures([chart]),
    )


def _html_table(name: str, titles: list[str], rows: list[list[str]]) -> Markup:
    head = tag("tr", *(tag("th", title, scope="col") for title in titles))
    lines = [tag("tr", *map(_html_cell, row)) for row in rows]
    return scrolled(tag("table", tag("thead", head), tag("tbody", *lines)), name)


def _html_cell(text: str) -> Markup:
    return tag("td", text, class_="n" if text[:1].isdigit() else None)


def _accuracy_chart(results: Reproduction) -> Chart:
    """Ours and the paper's accuracy over D, parameters or depth; dense networks are lines across."""
    over_bonds = results.study.axis == "parameters" or any(row.bond for row in results.rows)
    labels = list(dict.fromkeys(row.experiment.label for row in results.rows))
    places = {id(row): _place(results, row, labels, over_bonds) for row in results.rows}
    shown = [places[id(row)] for row in results.rows if row.start not in DENSE_STARTS or not over_bonds]
    series: list[Series] = []
    printed: dict[float, float] = {}
    for (start, variant), rows in _series(results).items():
        points = [(places[id(row)], row.mean("final")[0]) for row in rows]
        is_line = start in DENSE_STARTS and over_bonds
        if is_line and shown:
            points = [(x, points[0][1]) for x in (min(shown), max(shown))]
        elif is_line:
            continue
        name = ", ".join(filter(None, (_NAMES[start], variant)))
        style = "dotted line" if is_line and points[0] != points[-1] else "marked line"
        series.append(Series(name, tuple(points), style, tone_of(len(series) + 1)))
    for row in results.rows:
        if row.published and row.published.accuracy is not None and places[id(row)] in shown:
            printed[places[id(row)]] = row.published.accuracy
    if printed:
        series.append(Series("the paper's", tuple(printed.items()), "dots", "bound"))
    titles = {"D": "bond dimension D", "parameters": "parameters of the replaced layers"}
    x = Axis(titles.get(results.study.axis, results.study.axis), "log" if over_bonds else "linear")
    if not over_bonds and results.study.axis == "D":
        x = Axis("", unit="whole")
    caption = f"Accuracy on {results.material.measured} in per cent{_shortened_note(results)}."
    return Chart("Accuracy", caption, x, Axis("%"), tuple(series))


def _curves_chart(results: Reproduction) -> Chart:
    """Accuracy of the first run at every evaluation."""
    series: list[Series] = []
    for k, row in enumerate(results.rows, 1):
        before = _behind(results, row)
        points = tuple((before + point["epoch"], point["accuracy"]) for point in row.results[0].curve)
        bond = f", D = {row.bond}" if row.bond else ""
        name = f"{row.experiment.label}: {_NAMES[row.start]}{bond}"
        series.append(Series(name, points, "line" if k <= _TONES else "dotted line", tone_of(k)))
    caption = f"Accuracy on {results.material.measured} in per cent{_shortened_note(results)}."
    return Chart("Training", caption, Axis("epoch"), Axis("%"), tuple(series))


def _shortened_note(results: Reproduction) -> str:
    return f"; ours after a shortened training, {results.shortened}" if results.shortened else ""
