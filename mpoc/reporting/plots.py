"""Charts as PNG, SVG and PDF files, drawn by matplotlib.

A report gives one picture of the whole file and one of each replaced layer; ``--plot`` of ``finetune``,
``compress --max-drop`` and ``entanglement`` gives one picture.  All of them are :class:`Chart` objects of
plain numbers, drawn by one renderer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, UsageError, command_line
from mpoc.io.atomic import refuse_existing, staged
from mpoc.reporting.charts import (
    Axis,
    Chart,
    Series,
    comparison_charts,
    entropy_chart,
    entropy_text,
    layer_charts,
    spectrum_chart,
    training_charts,
)
from mpoc.reporting.contents import LayerData, read_files
from mpoc.reporting.network_diagram import RADIUS, Placed, diagrams_of, place_terms, stroke
from mpoc.reporting.svg import limits, tick_label, ticks
from mpoc.tensor_networks.fit.spectra import Cut

_TONES = {"stored": "#2a5db0", "original": "#b96f1c", "bound": "#b9c0cb", "error": "#b8473d"}
_FILES = ("#2a5db0", "#c0681b", "#2f8a63", "#8d4bb0", "#b8473d", "#6b7280")
_INK, _MUTED = "#1d2127", "#5d6673"
_STYLES = {
    "line": "-", "marked line": ".-", "dotted line": ":", "dots": "o", "dashed line": "x--", "crosses": "x",
}  # fmt: skip
_ACROSS = 4  # charts in a row at most
_SUFFIXES = (".svg", ".png")
_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
_LONGEST_NAME = 80  # of a layer, within the name of its file
_LONGEST_LABEL = 32  # of a file, within a legend; its end tells files apart
_NAMED = 8  # more layers than this have a scale of colours in place of names
_ENTROPY = "entanglement entropy S (nats)"
_METRICS = ("accuracy", "agreement", "cosine", "r2")  # the first that the log has is drawn


def refuse_existing_folder(folder: Path, source: Path, force: bool) -> None:
    """Check that figures may be written into a new ``folder``; called before any work.

    Raises:
        UsageError: it exists and ``force`` is not given, or it holds other files than figures.
        MpocError: its parent directory does not exist.
    """
    refuse_existing(folder, source, force, _refuse_other_files)


def _refuse_other_files(folder: Path, source: Path) -> None:
    others = (
        [file for file in folder.iterdir() if file.suffix not in _SUFFIXES] if folder.is_dir() else [folder]
    )
    if others:
        reason = f"holds {others[0].name}" if folder.is_dir() else "is a file"
        raise UsageError(
            f"{folder}: {reason}, which is not a figure, so --force does not remove it", "choose another DIR"
        )


def write_plots(
    path: Path,
    folder: Path,
    others: Sequence[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Draw all figures of ``path`` into ``folder``, which appears complete or not at all.

    Args:
        path: a compressed file or directory.
        folder: gets ``layers.svg``, ``layer-1-NAME.svg``, ``training.svg``, ``comparison.svg`` and the same
            as PNG; an existing folder is replaced.
        others: compressed files to compare with.
        report: called with a message for each layer.

    Returns:
        The names of the files.

    Raises:
        UsageError, MpocError: as :func:`mpoc.reporting.contents.read_files`.
    """
    compared = read_files(path, others)
    file = compared[0]
    with staged(folder) as scratch:
        scratch.mkdir()
        _draw_charts(scratch / "layers", layer_charts(file.manifest), file.name)
        _draw_charts(scratch / "training", training_charts(file.manifest.training), file.name)
        _draw_charts(scratch / "comparison", comparison_charts(compared) if others else [], "")
        for layer in file.layers:
            report(f"drawing {layer.record.layer}")
            _draw_layer(scratch / _file_name(layer), layer)
        return sorted(picture.name for picture in scratch.iterdir())


def _file_name(layer: LayerData) -> str:
    """A file name without special characters."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", layer.record.layer)[:_LONGEST_NAME]
    return f"{layer.anchor}-{plain}"


def _save(figure: Any, target: Path) -> None:
    """Write SVG and PNG; the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpoc", "svg.fonttype": "path"}):
        figure.savefig(target.with_name(f"{target.name}.svg"), metadata={"Date": None})
    figure.set_layout_engine("none")  # the first savefig computed it
    figure.savefig(target.with_name(f"{target.name}.png"), dpi=150)


def _draw_charts(target: Path, charts: Sequence[Chart], title: str) -> None:
    """Write charts side by side; no file where there are none."""
    from matplotlib.figure import Figure

    if not charts:
        return
    figure = Figure(figsize=(4.4 * len(charts), 3.4), layout="constrained")
    figure.suptitle(_plain(title), fontsize="medium", x=0.01, ha="left")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_chart(axes, chart)
    _save(figure, target)


def _draw_layer(target: Path, layer: LayerData) -> None:
    """Write the diagram of a layer above its spectra and entropies."""
    from matplotlib.figure import Figure

    charts = [chart for chart in (*map(spectrum_chart, layer.bonds), entropy_chart(layer)) if chart]
    placed = place_terms(diagrams_of(layer.record))
    rows = -(-len(charts) // _ACROSS)
    across = -(-len(charts) // rows) if rows else 1
    top = (placed[-1].top + placed[-1].height) / 90 if placed else 0.1
    figure = Figure(figsize=(max(3.6 * across, 5.0), top + 0.4 + 2.9 * rows), layout="constrained")
    record = layer.record
    entropy = entropy_text(layer)
    title = f"{record.layer}: {record.form}, ρ {record.rho:.4f}" + (f", entropy {entropy}" if entropy else "")
    figure.suptitle(_plain(title), fontsize="medium", x=0.01, ha="left")
    grid = figure.add_gridspec(1 + rows, across, height_ratios=[top, *([2.9] * rows)])
    if placed:
        _draw_network(figure.add_subplot(grid[0, :]), placed)
    for k, chart in enumerate(charts):
        _draw_chart(figure.add_subplot(grid[1 + k // across, k % across]), chart)
    _save(figure, target)


def _plain(text: str) -> str:
    """Escape dollar signs, which begin mathematics in matplotlib."""
    return text.replace("$", r"\$")


def _draw_chart(axes: Any, chart: Chart) -> None:
    axes.set_title(_plain(chart.title), fontsize="medium", loc="left", pad=18 if chart.mark else None)
    for series in chart.series:
        if series.points:
            _draw_series(axes, series)
    _scale_axis(axes, chart, 0)
    _scale_axis(axes, chart, 1)
    if chart.mark:
        axes.axvline(chart.mark.x, color=_INK, lw=1, ls="--")
        axes.annotate(
            chart.mark.label, (chart.mark.x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize="small",
        )  # fmt: skip
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1 and any(series.name and series.points for series in chart.series):
        axes.legend(fontsize="small", frameon=False).set_in_layout(False)


def _scale_axis(axes: Any, chart: Chart, side: int) -> None:
    """Set label, scale, ticks and limits along x (0) or y (1)."""
    axis, name = (chart.y, "y") if side else (chart.x, "x")
    along = getattr(axes, f"{name}axis")
    along.set_label_text(_plain(axis.label))
    if axis.scale == "log":
        getattr(axes, f"set_{name}scale")("log")
    if axis.names:
        labels = [_plain(_shortened(label)) for label in axis.names]
        along.set_ticks(range(1, len(labels) + 1), labels, fontsize="small", rotation=20, ha="right")
        getattr(axes, f"set_{name}lim")(0.5, len(labels) + 0.5)
    elif chart.values(side):
        ends = limits(axis, chart.values(side))
        values = ticks(axis, ends)
        along.set_ticks(values, [tick_label(axis, value) for value in values])
        along.set_ticks([], minor=True)
        if not any(series.style == "columns" for series in chart.series) or side == 1:
            getattr(axes, f"set_{name}lim")(*ends)


def _draw_series(axes: Any, series: Series) -> None:
    xs, ys = zip(*series.points, strict=True)
    colour, label = _colour(series.tone), _plain(_shortened(series.name)) or None
    if series.style == "columns":
        axes.bar(xs, ys, color=colour, label=label)
    elif series.style == "ring":
        axes.plot(xs, ys, "o", color=colour, ms=11, mfc="none", label=label)
    else:
        axes.plot(xs, ys, _STYLES[series.style], color=colour, ms=3 if len(xs) > 12 else 5, label=label)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"…{name[-_LONGEST_LABEL:]}"


def _colour(tone: str) -> Any:
    """The colour of a tone, of "file k", or of "scale t" with t from 0 to 1."""
    if tone in _TONES:
        return _TONES[tone]
    kind, _, number = tone.partition(" ")
    if kind == "file":
        return _FILES[int(number) - 1]
    from matplotlib import colormaps

    return colormaps["viridis"](float(number))


def _draw_network(axes: Any, placed: Sequence[Placed]) -> None:
    """Draw the diagram of a layer as the HTML page does, in the same units."""
    from matplotlib.patches import Circle

    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(0, max(term.left + term.width for term in placed))
    axes.set_ylim(placed[-1].top + placed[-1].height, 0)
    text = {"ha": "center", "va": "center", "fontsize": 9}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind labels of sloping lines
    for k, term in enumerate(placed):
        for bond in term.network.bonds:
            (x1, y1), (x2, y2) = term.at(bond.first), term.at(bond.second)
            axes.plot([x1, x2], [y1, y2], color=_TONES["stored"], lw=stroke(bond.size), zorder=1)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2 - 9
            axes.text(x, y, str(bond.size), color=_TONES["stored"], bbox=None if y1 == y2 else box, **text)
        for leg in term.network.legs:
            (x, y), (x_end, end) = term.at(leg.node), term.end(leg)
            axes.plot([x, x_end], [y, end], color=_MUTED, lw=stroke(leg.size), zorder=1)
            axes.text(x_end, end + (-9 if leg.up else 9), f"{leg.label} {leg.size}", color=_INK, **text)
        for node in term.network.nodes:
            x, y = term.at(node)
            axes.add_patch(Circle((x, y), RADIUS, facecolor="#f6f7f9", edgecolor=_INK, lw=1.2, zorder=2))
            axes.text(x, y, node.name, color=_INK, zorder=3, **text)
        if k:
            axes.text(12, term.at(0)[1], "+", color=_INK, ha="center", va="center", fontsize=14)


@dataclass(frozen=True)
class EntropyProfile:
    """The cuts of one layer: of its dense weight, of its stored cores, or of both."""

    layer: str
    weight: tuple[Cut, ...] | None
    stored: tuple[Cut, ...] | None

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts of the weight, else of the cores."""
        return self.weight or self.stored or ()


def draw_entropies(profiles: Sequence[EntropyProfile], picture: Path) -> None:
    """Draw S over the cuts, one line per layer; where no layer has two cuts, over the layers.

    Args:
        profiles: one per layer, in the order of the network.
        picture: .png, .svg or .pdf.
    """
    single = all(len(profile.cuts) <= 1 for profile in profiles)
    draw_picture(picture, [_layers_chart(profiles) if single else _profiles_chart(profiles)])


def _layers_chart(profiles: Sequence[EntropyProfile]) -> Chart:
    """The only cut of each layer."""
    numbered = list(enumerate(profiles, start=1))
    weight = tuple((float(k), cut.entropy) for k, profile in numbered for cut in profile.weight or ())
    stored = tuple((float(k), cut.entropy) for k, profile in numbered for cut in profile.stored or ())
    largest = tuple((float(k), cut.largest_entropy) for k, profile in numbered for cut in profile.cuts)
    series = (
        Series("dense", weight, "dots", "stored"),
        Series("stored", stored, "crosses", "original"),
        Series("largest possible", largest, "dotted line", "bound"),
    )
    names = tuple(profile.layer for profile in profiles) if len(profiles) <= _NAMED else ()
    x = Axis("" if names else "layer", unit="whole", names=names)
    return Chart("Entanglement", "", x, Axis(_ENTROPY, from_zero=True), series)


def _profiles_chart(profiles: Sequence[EntropyProfile]) -> Chart:
    """All cuts of each layer, without names and bounds if there are more than ``_NAMED`` layers."""
    named = len(profiles) <= _NAMED
    series: list[Series] = []
    for k, profile in enumerate(profiles):
        tone = f"file {k % len(_FILES) + 1}" if named else f"scale {k / (len(profiles) - 1):.4f}"
        kinds = [(profile.weight, "marked line"), (profile.stored, "dashed line")]
        drawn = [(cuts, style) for cuts, style in kinds if cuts]
        for j, (cuts, style) in enumerate(drawn):
            points = tuple((float(cut.site), cut.entropy) for cut in cuts)
            series.append(Series(profile.layer if named and j == 0 else "", points, style, tone))
        if named and drawn:
            bound = tuple((float(cut.site), cut.largest_entropy) for cut in drawn[0][0])
            series.append(Series("", bound, "dotted line", tone))
    styles = "dense: solid, stored: dashed" + (
        ", largest possible: dotted" if named else "; first layer dark, last light"
    )
    x, y = Axis("cut behind site k", unit="whole"), Axis(_ENTROPY, from_zero=True)
    return Chart(f"Entanglement ({styles})", "", x, y, tuple(series))


def draw_curves(log: Iterable[dict[str, Any]], picture: Path) -> None:
    """Draw the losses, and the metric of the measured split, one line per run.

    Args:
        log: the lines of a training log.
        picture: .png, .svg or .pdf.
    """
    runs: list[list[dict[str, Any]]] = [[]]
    for line in log:
        if "run" in line and "step" not in line:
            runs += [[]] if runs[-1] else []
        elif "step" in line:
            runs[-1].append(line)
    losses: list[Series] = []
    metrics: list[Series] = []
    metric = "loss"
    for k, lines in enumerate(runs):
        tone = f"file {k % len(_FILES) + 1}"
        run = f" (run {k + 1})" if len(runs) > 1 else ""
        steps = [line for line in lines if "lr" in line]
        scored = [line for line in lines if "split" in line and "loss" in line and "epoch" in line]
        split = scored[0]["split"] if scored else ""
        metric = next((name for name in _METRICS if scored and name in scored[0]), "loss")
        losses.append(Series(f"training{run}", _over_epochs(steps, "loss"), "line", tone))
        losses.append(Series(f"{split}{run}", _over_epochs(scored, "loss"), "dashed line", tone))
        metrics.append(Series(f"{split}{run}", _over_epochs(scored, metric), "marked line", tone))
    charts = [Chart("", "", Axis("epoch"), Axis("loss"), tuple(line for line in losses if line.points))]
    if any(line.points for line in metrics):
        charts.append(Chart("", "", Axis("epoch"), Axis(metric), tuple(metrics)))
    draw_picture(picture, charts)


def _over_epochs(lines: Iterable[dict[str, Any]], name: str) -> tuple[tuple[float, float], ...]:
    return tuple((line["epoch"], line[name]) for line in lines if line.get(name) is not None)


def draw_picture(picture: Path, charts: Sequence[Chart]) -> None:
    """Write one file, .png, .svg or .pdf, with charts side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 + 3.4 * len(charts), 4), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_chart(axes, chart)
    with staged(picture) as target:
        figure.savefig(target)


def refuse_unknown_picture(path: Path) -> None:
    """Check that ``path`` can be drawn; called before any work.

    Raises:
        UsageError: an unknown suffix.
        MpocError: matplotlib or the directory is missing.
    """
    if path.suffix not in _PICTURE_SUFFIXES:
        raise UsageError(f"--plot {path}: the name of a picture must end in {', '.join(_PICTURE_SUFFIXES)}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise MpocError(f"--plot {path}: no directory {folder}", command_line("mkdir", "-p", folder))
    require_matplotlib()


def require_matplotlib() -> None:
    """Raise MpocError where matplotlib is missing; called before any work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MpocError("--plot needs matplotlib", "pip install 'mpoc[plot]'") from error
