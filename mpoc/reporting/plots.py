"""The page's figures as SVG and PNG, drawn by matplotlib: one of the file, one a replaced layer.

Entropies as a picture: S_k over the cuts, a line a layer; S over layers where none has two cuts.

The trials of a search as a picture: the metric over the size on disk.

The training log as a picture: loss and metric over epochs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import refuse_existing, staged
from mpoc.reporting.charts import (
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
_STYLES = {"line": "-", "marked line": ".-", "dotted line": ":", "dots": "o"}
_ACROSS = 4  # charts in a row at most
_SUFFIXES = (".svg", ".png")
_LONGEST_NAME = 80  # of a layer, within the name of its file
_LONGEST_LABEL = 32  # of a file, within a legend; its end tells files apart

# More layers than this have a scale of colours, and no names.
_NAMED = 8
_LAYERS = "layer, from the first to the last"
_ENTROPY = "entanglement entropy S (nats)"
_METRICS = ("accuracy", "agreement", "cosine", "r2")  # the first that is known is drawn


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
    placed = place_terms(diagrams_of(layer.record))
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
            along.set_ticks(values, [tick_label(axis, value) for value in values])
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


@dataclass(frozen=True)
class EntropyProfile:
    """The cuts of one layer: of its dense weight, of what is stored of it, or of both."""

    layer: str
    weight: tuple[Cut, ...] | None
    stored: tuple[Cut, ...] | None


def draw_entropies(profiles: Sequence[EntropyProfile], picture: Path) -> None:
    """Dense weights in full lines, what is stored dashed, the largest possible entropy dotted.

    Where no layer has two cuts there are no lines: all layers then stand below each other.

    Args:
        profiles: a layer each, in the order of the network.
        picture: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    single = all(len(profile.weight or profile.stored or ()) <= 1 for profile in profiles)
    (_draw_layers if single else _draw_profiles)(figure.subplots(), profiles)
    with staged(picture) as scratch:
        figure.savefig(scratch)


def _draw_layers(axes: Any, profiles: Sequence[EntropyProfile]) -> None:
    """The only cut of each, below each other."""
    from matplotlib.ticker import MaxNLocator

    weights = [(k, cut) for k, profile in enumerate(profiles, start=1) for cut in profile.weight or ()]
    stored = [(k, cut) for k, profile in enumerate(profiles, start=1) for cut in profile.stored or ()]
    largest = [(k, cut.largest_entropy) for k, cut in weights or stored]
    for said, style, colour, points in (
        ("dense", ".", "C0", [(k, cut.entropy) for k, cut in weights]),
        ("stored", "x", "C1", [(k, cut.entropy) for k, cut in stored]),
        ("largest possible", "|", "0.6", largest),
    ):
        if points:
            axes.plot([s for _, s in points], [k for k, _ in points], style, color=colour, label=said)
    axes.set_xlim(left=0)
    axes.set_xlabel(_ENTROPY)
    axes.set_ylim(len(profiles) + 0.5, 0.5)
    if len(profiles) <= _NAMED:
        axes.set_yticks(
            range(1, len(profiles) + 1), [profile.layer for profile in profiles], fontsize="small"
        )
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(_LAYERS)
    if largest:
        axes.figure.legend(loc="outside upper right", ncols=3, fontsize="small")


def _draw_profiles(axes: Any, profiles: Sequence[EntropyProfile]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    named = len(profiles) <= _NAMED
    scale = Normalize(1, max(len(profiles), 2))
    for number, profile in enumerate(profiles, start=1):
        colour = f"C{number - 1}" if named else colormaps["viridis"](scale(number))
        _draw_profile(axes, profile, colour, named)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cut behind site k")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(_ENTROPY)
    _tell_styles(axes, profiles, named)
    if named:
        axes.legend(fontsize="small")
    else:
        axes.figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label=_LAYERS)


def _tell_styles(axes: Any, profiles: Sequence[EntropyProfile], named: bool) -> None:
    """A legend of what kinds of lines there are, whatever their colour."""
    styles = (
        ("dense", ".-", any(profile.weight for profile in profiles)),
        ("stored", "x--", any(profile.stored for profile in profiles)),
        ("largest possible", "_:", named),
    )
    drawn = {said: axes.plot([], [], style, color="0.4")[0] for said, style, there in styles if there}
    axes.figure.legend(drawn.values(), drawn, loc="outside upper right", ncols=3, fontsize="small")


def _draw_profile(axes: Any, profile: EntropyProfile, colour: Any, named: bool) -> None:
    parts = ((profile.weight, ".-"), (profile.stored, "x--"))
    drawn = [(cuts, style) for cuts, style in parts if cuts]
    for cuts, style in drawn:
        label = profile.layer if cuts is drawn[0][0] else None
        axes.plot(*_points(cuts), style, color=colour, label=label, lw=None if named else 1)
    if named and drawn:
        cuts = drawn[0][0]
        largest = [cut.largest_entropy for cut in cuts]
        axes.plot([cut.site for cut in cuts], largest, "_:", color=colour, lw=1)


def _points(cuts: tuple[Cut, ...]) -> tuple[list[int], list[float]]:
    return [cut.site for cut in cuts], [cut.entropy for cut in cuts]


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
    nbytes, metric = trials.dense
    if nbytes is not None:
        axes.plot([nbytes], [metric], "D", color="0.25", label="dense")
    axes.axhline(trials.limit, color="0.6", lw=1, ls="--", label=trials.limit_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("size on disk")
    axes.set_ylabel(trials.metric)
    axes.legend(fontsize="small")
    with staged(picture) as scratch:
        figure.savefig(scratch)


_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def refuse_unknown_picture(path: Path) -> None:
    """Check, before any work, that a picture can be drawn there.

    Raises:
        UsageError: another suffix.
        MpocError: matplotlib is missing, or the directory.
    """
    if path.suffix not in _PICTURE_SUFFIXES:
        raise UsageError(f"--plot {path}: the name of a picture ends in {', '.join(_PICTURE_SUFFIXES)}")
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


def require_matplotlib() -> None:
    """Check, before any work, that figures can be drawn.

    Raises:
        MpocError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MpocError("--plot needs matplotlib", "pip install 'mpoc[plot]'") from error
