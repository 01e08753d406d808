"""The page's figures as SVG and PNG, drawn by matplotlib: one of the file, one a replaced layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError
from mpoc.pictures.chart import Chart, Series
from mpoc.pictures.data import LayerData, read_files
from mpoc.pictures.figures import (
    comparison_charts,
    entropy_chart,
    entropy_text,
    layer_charts,
    spectrum_chart,
    training_charts,
)
from mpoc.pictures.network import networks_of
from mpoc.pictures.svg_network import RADIUS, Placed, place_terms, stroke
from mpoc.pictures.ticks import limits, ticks, written
from mpoc.writer import refuse_existing, staged

_TONES = {"stored": "#2a5db0", "original": "#b96f1c", "bound": "#b9c0cb", "error": "#b8473d"}
_FILES = ("#2a5db0", "#c0681b", "#2f8a63", "#8d4bb0", "#b8473d", "#6b7280")
_INK, _MUTED = "#1d2127", "#5d6673"
_STYLES = {"line": "-", "marked line": ".-", "dotted line": ":", "dots": "o"}
_ACROSS = 4  # charts in a row at most
_SUFFIXES = (".svg", ".png")
_LONGEST_NAME = 80  # of a layer, within the name of its file
_LONGEST_LABEL = 32  # of a file, within a legend; its end tells files apart


def refuse_existing_folder(folder: Path, source: Path, force: bool) -> None:
    """Check, before any work, that figures may be written into a new ``folder``.

    Raises:
        UsageError: it exists and ``force`` is not given, or it holds more than figures.
        MpocError: there is no place for it.
    """
    refuse_existing(folder, source, force, _refuse_other_files)


def _refuse_other_files(folder: Path, source: Path) -> None:
    others = (
        [file for file in folder.iterdir() if file.suffix not in _SUFFIXES] if folder.is_dir() else [folder]
    )
    if others:
        what = f"holds {others[0].name}" if folder.is_dir() else "is a file"
        raise UsageError(
            f"{folder}: {what}, which is no figure, so --force does not remove it", "choose another DIR"
        )


def write_plots(
    path: Path,
    folder: Path,
    others: Sequence[Path] = (),
    told: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Draw all figures of ``path`` into a new ``folder``, whole or not at all.

    Args:
        path: a compressed file or directory.
        folder: where ``layers.svg``, ``layer-1-NAME.svg``, ``training.svg``, ``comparison.svg`` and the same
            as PNG go; one that exists is replaced.
        others: compressed files to compare with.
        told: is told of each layer.

    Returns:
        The names of the files.

    Raises:
        UsageError, MpocError: as :func:`mpoc.pictures.data.read_files`.
    """
    compared = read_files(path, others)
    file = compared[0]
    with staged(folder) as scratch:
        scratch.mkdir()
        _draw_charts(scratch / "layers", layer_charts(file.manifest), file.name)
        _draw_charts(scratch / "training", training_charts(file.manifest.training), file.name)
        _draw_charts(scratch / "comparison", comparison_charts(compared) if others else [], "")
        for layer in file.layers:
            told(f"drawing {layer.record.layer}")
            _draw_layer(scratch / _file_name(layer), layer)
        return sorted(one.name for one in scratch.iterdir())


def _file_name(layer: LayerData) -> str:
    """A name that any file system takes."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", layer.record.layer)[:_LONGEST_NAME]
    return f"{layer.anchor}-{plain}"


def _save(figure: Any, target: Path) -> None:
    """As SVG and PNG, the same bytes for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpoc", "svg.fonttype": "path"}):
        figure.savefig(target.with_name(f"{target.name}.svg"), metadata={"Date": None})
    figure.set_layout_engine("none")  # found already
    figure.savefig(target.with_name(f"{target.name}.png"), dpi=150)


def _draw_charts(target: Path, charts: Sequence[Chart], title: str) -> None:
    """Charts side by side; nothing where there are none."""
    from matplotlib.figure import Figure

    if not charts:
        return
    figure = Figure(figsize=(4.4 * len(charts), 3.4), layout="constrained")
    figure.suptitle(_plain(title), fontsize="medium", x=0.01, ha="left")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_chart(axes, chart)
    _save(figure, target)


def _draw_layer(target: Path, layer: LayerData) -> None:
    """The network above its spectra and entropies."""
    from matplotlib.figure import Figure

    found = [*map(spectrum_chart, layer.bonds), entropy_chart(layer)]
    charts = [chart for chart in found if chart]
    placed = place_terms(networks_of(layer.record))
    rows = -(-len(charts) // _ACROSS)
    across = -(-len(charts) // rows) if rows else 1
    top = (placed[-1].top + placed[-1].height) / 90 if placed else 0.1
    figure = Figure(figsize=(max(3.6 * across, 5.0), top + 0.4 + 2.9 * rows), layout="constrained")
    record = layer.record
    known = entropy_text(layer)
    title = f"{record.layer}: {record.form}, ρ {record.rho:.4f}" + (f", entropy {known}" if known else "")
    figure.suptitle(_plain(title), fontsize="medium", x=0.01, ha="left")
    grid = figure.add_gridspec(1 + rows, across, height_ratios=[top, *([2.9] * rows)])
    if placed:
        _draw_network(figure.add_subplot(grid[0, :]), placed)
    for k, chart in enumerate(charts):
        _draw_chart(figure.add_subplot(grid[1 + k // across, k % across]), chart)
    _save(figure, target)


def _plain(text: str) -> str:
    """Without mathematics: a dollar sign in a name is one."""
    return text.replace("$", r"\$")


def _draw_chart(axes: Any, chart: Chart) -> None:
    axes.set_title(_plain(chart.title), fontsize="medium", loc="left", pad=18 if chart.mark else None)
    for one in chart.series:
        if one.points:
            _draw_series(axes, one)
    for axis, side, name in ((chart.x, 0, "x"), (chart.y, 1, "y")):
        along = getattr(axes, f"{name}axis")
        along.set_label_text(axis.label)
        if axis.scale == "log":
            getattr(axes, f"set_{name}scale")("log")
        if chart.values(side):
            ends = limits(axis, chart.values(side))
            values = ticks(axis, ends)
            along.set_ticks(values, [written(axis, value) for value in values])
            along.set_ticks([], minor=True)
            if not any(one.style == "columns" for one in chart.series) or side == 1:
                getattr(axes, f"set_{name}lim")(*ends)
    if chart.mark:
        axes.axvline(chart.mark.x, color=_INK, lw=1, ls="--")
        axes.annotate(
            chart.mark.label, (chart.mark.x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize="small",
        )  # fmt: skip
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        axes.legend(fontsize="small", frameon=False).set_in_layout(False)


def _draw_series(axes: Any, series: Series) -> None:
    tone = series.tone
    colour = _TONES.get(tone) or _FILES[int(tone.split()[-1]) - 1]
    xs, ys = zip(*series.points, strict=True)
    short = series.name if len(series.name) <= _LONGEST_LABEL else f"…{series.name[-_LONGEST_LABEL:]}"
    name = _plain(short)
    if series.style == "columns":
        axes.bar(xs, ys, color=colour, label=name)
    else:
        axes.plot(xs, ys, _STYLES[series.style], color=colour, ms=3 if len(xs) > 12 else 5, label=name)


def _draw_network(axes: Any, placed: Sequence[Placed]) -> None:
    """As the page draws it, in the same units."""
    from matplotlib.patches import Circle

    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(0, max(one.left + one.width for one in placed))
    axes.set_ylim(placed[-1].top + placed[-1].height, 0)
    text = {"ha": "center", "va": "center", "fontsize": 9}
    over = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line that is not level
    for k, one in enumerate(placed):
        for bond in one.network.bonds:
            (x1, y1), (x2, y2) = one.at(bond.first), one.at(bond.second)
            axes.plot([x1, x2], [y1, y2], color=_TONES["stored"], lw=stroke(bond.size), zorder=1)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2 - 9
            axes.text(x, y, str(bond.size), color=_TONES["stored"], bbox=None if y1 == y2 else over, **text)
        for leg in one.network.legs:
            (x, y), (x_end, end) = one.at(leg.node), one.end(leg)
            axes.plot([x, x_end], [y, end], color=_MUTED, lw=stroke(leg.size), zorder=1)
            axes.text(x_end, end + (-9 if leg.up else 9), f"{leg.label} {leg.size}", color=_INK, **text)
        for node in one.network.nodes:
            x, y = one.at(node)
            axes.add_patch(Circle((x, y), RADIUS, facecolor="#f6f7f9", edgecolor=_INK, lw=1.2, zorder=2))
            axes.text(x, y, node.name, color=_INK, zorder=3, **text)
        if k:
            axes.text(12, one.at(0)[1], "+", color=_INK, ha="center", va="center", fontsize=14)
