"""Charts as plain data: of a compressed file, of one layer, of a training, of a comparison.

The HTML page draws them as inline SVG, matplotlib into files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.safetensors_header import ITEMSIZE
from mpoc.reporting.contents import BondSpectra, FileData, LayerData
from mpoc.runtime.formatting import human_bytes

# Meanings of colours; a comparison has "file 1", "file 2", … too.
TONES = ("stored", "original", "bound", "error")
STYLES = ("line", "dots", "columns", "marked line", "dotted line")

# Schmidt values below this share of the largest are not drawn.
_LEAST = 1e-3
# The first of these scores that a training has is drawn.
_METRICS = ("accuracy", "agreement", "cosine", "r2", "perplexity", "bits_per_character")
_FILE_TONES = 6
_LARGEST = 1e100  # value on an axis
_IN_ORDER = "layer, in the order of the file"
ERRORS = {
    "held_out_error": "held-out error",
    "output_error": "output error",
    "relative_error": "relative error",
}


@dataclass(frozen=True)
class Axis:
    """One side of a chart."""

    label: str
    scale: str = "linear"  # or "log"
    unit: str = ""  # "count": 1.2k, "bytes": 1.2 MB, "whole": ticks at whole numbers only
    from_zero: bool = False
    names: tuple[str, ...] = ()  # of the ticks 1, 2, …, in place of numbers


_BY_LAYER = Axis(_IN_ORDER, unit="whole")


@dataclass(frozen=True)
class Series:
    """Points of one colour and style."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str  # one of STYLES
    tone: str  # one of TONES, or "file 1", …
    names: tuple[str, ...] = ()  # of the points, where they have any


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart; ``caption`` says what it shows."""

    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    mark: Mark | None = None

    def values(self, side: int) -> list[float]:
        """All coordinates along x (0) or y (1), including the mark's."""
        values = [point[side] for series in self.series for point in series.points]
        return values + ([self.mark.x] if self.mark and side == 0 else [])


@dataclass(frozen=True)
class ErrorKind:
    """One of the errors that a record holds."""

    key: str

    @property
    def name(self) -> str:
        """Its name in charts and tables."""
        return ERRORS[self.key]

    def of(self, layer: LayerRecord) -> float | None:
        """The error of a layer; 0 where it is dense."""
        return getattr(layer, self.key) if layer.is_changed else 0.0


def shared_error(manifests: Sequence[Manifest]) -> ErrorKind | None:
    """The most informative error that all replaced layers of all files have; None where there is none."""
    layers = [layer for manifest in manifests for layer in manifest.changed]
    for key in ERRORS:
        kind = ErrorKind(key)
        if layers and all(kind.of(layer) is not None for layer in layers):
            return kind
    return None


def best_error(manifest: Manifest) -> ErrorKind | None:
    """The most informative error that most replaced layers have."""
    for key in ERRORS:
        kind = ErrorKind(key)
        if sum(kind.of(layer) is not None for layer in manifest.changed) * 2 > len(manifest.changed):
            return kind
    return None


def layer_charts(manifest: Manifest) -> list[Chart]:
    """Size, compression and error of every layer, in the order of the file.

    Sizes are parameters; where layers are rounded and none has cores, bytes.
    """
    if not manifest.layers:
        return []
    in_bytes = bool(manifest.changed) and not manifest.replaced
    charts = [_sizes_chart(manifest, in_bytes), _ratio_chart(manifest, in_bytes), _error_chart(manifest)]
    return [chart for chart in charts if chart is not None]


def _sizes_chart(manifest: Manifest, in_bytes: bool) -> Chart:
    pairs = [(layer.num_original, layer.num_stored) for layer in manifest.layers]
    texts = [f"{before:,} → {after:,}" for before, after in pairs]
    if in_bytes:
        pairs = [(n.num_original * ITEMSIZE[n.dtype], n.stored_bytes) for n in manifest.layers]
        texts = [f"{human_bytes(before)} → {human_bytes(after)}" for before, after in pairs]
    what = "Bytes" if in_bytes else "Parameters"
    names = _names(manifest, texts)
    before, after = (
        Series(name, _in_order([float(pair[side]) for pair in pairs]), "columns", tone, names)
        for side, (name, tone) in enumerate((("before", "bound"), ("after", "stored")))
    )
    y = Axis("", unit="bytes" if in_bytes else "count", from_zero=True)
    return Chart(what, f"{what} of each layer before and after.", _BY_LAYER, y, (before, after))


def _ratio_chart(manifest: Manifest, in_bytes: bool) -> Chart:
    layers = manifest.layers
    title, caption = "Compression ratio ρ", "Parameters after over before; 1 where a layer stays dense."
    values, texts = [layer.rho for layer in layers], [f"ρ {layer.rho:.4f}" for layer in layers]
    if in_bytes:
        title, caption = "Bits a weight", "Stored bits over the numbers of the weight, layer by layer."
        values = [layer.bits_per_weight for layer in layers]
        texts = [f"{value:.2f} bits a weight" for value in values]
    series = Series(title, _in_order(values), "columns", "stored", _names(manifest, texts))
    return Chart(title, caption, _BY_LAYER, Axis("", from_zero=True), (series,))


def _in_order(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple((float(k), value) for k, value in enumerate(values, start=1))


def _names(manifest: Manifest, texts: Sequence[str]) -> tuple[str, ...]:
    """What the points of a chart of layers are called."""
    named = zip(manifest.layers, texts, strict=True)
    return tuple(f"{k}  {layer.layer}: {text}" for k, (layer, text) in enumerate(named, start=1))


def _error_chart(manifest: Manifest) -> Chart | None:
    kind = best_error(manifest) if manifest.changed else None
    if kind is None:
        return None
    errors = [
        (k, layer, error)
        for k, layer in enumerate(manifest.layers, start=1)
        if (error := kind.of(layer)) is not None
    ]
    points = tuple((float(k), error) for k, _, error in errors)
    names = tuple(f"{k}  {layer.layer}: {error:.4f}" for k, layer, error in errors)
    of = {
        "relative_error": "of each weight",
        "output_error": "of the outputs about their mean, on the inputs of the fit",
        "held_out_error": "of the outputs about their mean, on held-out inputs",
    }
    return Chart(
        kind.name.capitalize(),
        f"Relative error {of[kind.key]}.",
        _BY_LAYER,
        Axis("", from_zero=True),
        (Series(kind.name, points, "columns", "error", names),),
    )


def spectrum_chart(bond: BondSpectra) -> Chart | None:
    """Schmidt values of the stored weight and, where recorded, of the original, with the bond dimension."""
    scale = bond.scale if bond.scale is not None else 1.0
    stored = tuple((float(k), value * scale) for k, value in bond.stored)
    original = tuple((float(k), value) for k, value in bond.original or ())
    largest = max((value for _, value in stored + original), default=0.0)
    series = tuple(
        Series(name, drawn, style, tone)
        for name, points, style, tone in (
            ("original", original, "line", "original"),
            ("stored", stored, "marked line", "stored"),
        )
        if (drawn := tuple(point for point in points if point[1] > largest * _LEAST))
    )
    if not series:
        return None
    of = "of the original and of the stored weight" if original else "of the stored weight"
    return Chart(
        bond.title.capitalize(),
        f"Schmidt values {of}, down to a thousandth of the largest.",
        Axis("index", "log"),
        Axis("Schmidt value / norm", "log"),
        series,
        Mark(float(bond.kept), f"D = {bond.kept}"),
    )


def entropy_chart(layer: LayerData) -> Chart | None:
    """The entanglement entropy along a chain or over a tree; None with fewer than two bonds."""
    bonds = [bond for bond in layer.bonds if bond.title != "low-rank part"]
    structure = layer.record.structure
    if len(bonds) < 2 or structure.parts:
        return None
    places = [float(k) for k in range(1, len(bonds) + 1)]
    known = layer.record.entropies_of_weight
    original = tuple((k, s) for k, s in zip(places, known, strict=False) if s is not None)
    topology = structure.topology
    largest, stored = [math.log(bond.kept) for bond in bonds], [bond.entropy for bond in bonds]
    series = [
        Series("ln D", _points(places, largest), "dotted line" if topology.in_line else "dots", "bound"),
        Series("original", original, "dots", "original"),
        Series("stored", _points(places, stored), "marked line" if topology.in_line else "dots", "stored"),
    ]
    return Chart(
        "Entropy",
        f"Entanglement entropy S = −Σ s² ln s² at each {topology.bond_place}; it is at most ln D.",
        Axis(topology.bond_name, unit="whole"),
        Axis("entropy (nats)", from_zero=True),
        tuple(line for line in series if line.points),
    )


def entropy_text(layer: LayerData) -> str:
    """The entropy of a single bond, which has no profile, or why a network with loops has none."""
    info = layer.record.structure.info
    if info.topology.has_loops:
        return f"none: no single bond separates a {info.title} into two parts"
    if len(layer.bonds) != 1:
        return ""
    known = layer.record.entropies_of_weight
    was = f", of the original {known[0]:.4g}" if known and known[0] is not None else ""
    return f"{layer.bonds[0].entropy:.4g} nats{was}"


def _points(places: list[float], values: list[float]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(places, values, strict=True))


def training_charts(training: dict[str, Any]) -> list[Chart]:
    """Loss and metric at every evaluation, for every training, the first one first."""
    charts: list[Chart] = []
    history: Any = training
    while isinstance(history, dict) and history:
        charts = _training(history) + charts
        history = history.get("earlier")
    return charts


def _training(history: dict[str, Any]) -> list[Chart]:
    evaluations = history.get("evaluations")
    if not isinstance(evaluations, list):
        return []
    data = history.get("data")
    name = data.get("name", "?") if isinstance(data, dict) else "?"
    held_out = str(history.get("split") or "held-out")
    x = Axis("epoch")
    losses = (
        Series("training", _over_epochs(evaluations, "train_loss"), "marked line", "original"),
        Series(held_out, _over_epochs(evaluations, "loss"), "marked line", "stored"),
    )
    drawn = tuple(line for line in losses if line.points)
    charts = [Chart("Loss while training", f"Fine-tuned on {name}.", x, Axis(""), drawn)] if drawn else []
    metric = next((name for name in _METRICS if _over_epochs(evaluations, name)), None)
    if metric is not None:
        word = metric.replace("_", " ")
        unit = " (%)" if metric in ("accuracy", "agreement") else ""
        line = Series(held_out, _over_epochs(evaluations, metric), "marked line", "stored")
        caption = f"Of the {held_out} split of {name}, at every evaluation."
        charts.append(
            Chart(f"{word.capitalize()} while training", caption, x, Axis(unit.strip(" ()")), (line,))
        )
    return charts


def _over_epochs(evaluations: list[Any], name: str) -> tuple[tuple[float, float], ...]:
    """(epoch, value) of the evaluations with a finite value of this name."""
    pairs = [(_finite(e.get("epoch")), _finite(e.get(name))) for e in evaluations if isinstance(e, dict)]
    return tuple((x, y) for x, y in pairs if x is not None and y is not None)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else None


def common_layers(manifests: Sequence[Manifest]) -> frozenset[str]:
    """The layers that every file selected."""
    return frozenset.intersection(
        *(frozenset(layer.layer for layer in manifest.layers) for manifest in manifests)
    )


def mean_error(manifest: Manifest, kind: ErrorKind, names: Collection[str]) -> float:
    """The mean error over layers of these names, at least one; layers left dense count as 0."""
    errors = [kind.of(layer) or 0.0 for layer in manifest.layers if layer.layer in names]
    return sum(errors) / len(errors)


def tone_of(place: int) -> str:
    """The tone of file ``place``, from 1, in a comparison."""
    return f"file {(place - 1) % _FILE_TONES + 1}"


def comparison_charts(files: Sequence[FileData]) -> list[Chart]:
    """Size against error, of whole files where they have common layers, and of their layers."""
    kind = shared_error([file.manifest for file in files])
    if kind is None:
        return []
    layers = Chart(
        "Size against error, layer by layer",
        "Each dot is one replaced layer.",
        Axis("ρ", from_zero=True),
        Axis(kind.name, from_zero=True),
        tuple(_layers_of(file, kind, tone_of(k)) for k, file in enumerate(files, start=1)),
    )
    names = common_layers([file.manifest for file in files])
    return [_whole_files(files, kind, names), layers] if names else [layers]


def _whole_files(files: Sequence[FileData], kind: ErrorKind, names: Collection[str]) -> Chart:
    whole = tuple(
        Series(file.name, ((float(file.nbytes), mean_error(file.manifest, kind, names)),), "dots", tone_of(k))
        for k, file in enumerate(files, start=1)
    )
    before = {float(file.manifest.source.nbytes) for file in files if file.manifest.source.nbytes}
    dense = Series("dense", tuple((nbytes, 0.0) for nbytes in sorted(before)), "dots", "bound")
    return Chart(
        "Size against error",
        f"Bytes on disk and the mean {kind.name} over the {len(names)} layers selected in every file; layers "
        "left dense count as 0.",
        Axis("size on disk", unit="bytes", from_zero=True),
        Axis(f"mean {kind.name}", from_zero=True),
        (*whole, *([dense] if before else [])),
    )


def _layers_of(file: FileData, kind: ErrorKind, tone: str) -> Series:
    errors = [(layer, error) for layer in file.manifest.changed if (error := kind.of(layer)) is not None]
    points = tuple((layer.rho, error) for layer, error in errors)
    names = tuple(f"{layer.layer} ({file.name}): ρ {layer.rho:.4f}, {error:.4f}" for layer, error in errors)
    return Series(file.name, points, "dots", tone, names)
