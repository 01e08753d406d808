"""Sections of the HTML page: charts, the table of layers, each replaced layer, the comparison of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.reporting.charts import (
    ERRORS,
    Chart,
    ErrorKind,
    common_layers,
    comparison_charts,
    entropy_chart,
    entropy_text,
    mean_error,
    shared_error,
    spectrum_chart,
    tone_of,
)
from mpoc.reporting.contents import FileData, LayerData
from mpoc.reporting.network_diagram import diagrams_of, network_svg
from mpoc.reporting.svg import Markup, breakable, chart_svg, join, tag
from mpoc.runtime.formatting import human_bytes, times


def title_of(text: str, anchor: str) -> Markup:
    """A heading with an anchor."""
    return tag("h2", text, id=anchor)


def figures(charts: Sequence[Chart], small: bool = False) -> Markup | None:
    """Charts side by side, wrapped to the width of the page."""
    if not charts:
        return None
    size = (280, 200) if small else (344, 208)
    return tag(
        "div", *(figure(chart, *size) for chart in charts), class_="figures small" if small else "figures"
    )


def figure(chart: Chart, width: int, height: int) -> Markup:
    """A chart with title and legend above and the caption below."""
    keys = [
        tag(
            "span",
            tag("i", class_=f"t-{series.tone.replace(' ', '-')} {series.style.replace(' ', '-')}"),
            series.name,
        )
        for series in chart.series
    ]
    legend = tag("span", *keys, class_="legend") if len(keys) > 1 else None
    caption = tag("span", chart.caption, class_="muted")
    return tag(
        "figure",
        tag("div", tag("b", chart.title), legend, class_="top"),
        chart_svg(chart, width, height),
        tag("figcaption", caption),
    )


def cell(
    value: str,
    key: float | None = None,
    bar: float | None = None,
    tone: str = "stored",
    class_: str | None = None,
) -> Markup:
    """A cell of a table.

    Args:
        value: its text.
        key: a number to sort by; None: sorted by the text.
        bar: length of a bar below the text, from 0 to 1; None: no bar.
        tone: tone of the bar.
        class_: "wide" where narrow pages hide the cell.
    """
    drawn = None
    if bar is not None:
        length = f"width:{100 * min(max(bar, 0.0), 1.0):.1f}%"
        drawn = tag("span", tag("span", style=length, class_=f"t-{tone.replace(' ', '-')}"), class_="bar")
    classes = " ".join(filter(None, [None if key is None else "n", class_]))
    return tag("td", value, drawn, class_=classes or None, data_v=value if key is None else str(key))


def header_cell(name: str, class_: str | None = None) -> Markup:
    """The heading of a column, with a button that sorts by it."""
    return tag("th", tag("button", name, type="button"), scope="col", class_=class_)


def scrolled(table: Markup, label: str) -> Markup:
    """A table that scrolls sideways on a narrow page, by touch and by keyboard."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def error_text(error: float | None) -> str:
    """``0.1234``, or ``1.2e-05`` where it is small; "" where it is unknown."""
    if error is None:
        return ""
    return f"{error:.1e}" if 0 < error < 1e-4 else f"{error:.4f}" if error else "0"


def layer_section(layer: LayerData) -> Markup:
    """The collapsible section of one replaced layer: its diagram, facts, spectra and entropies."""
    record = layer.record
    charts = [*map(spectrum_chart, layer.bonds), entropy_chart(layer)]
    return tag(
        "details",
        tag(
            "summary",
            tag("b", breakable(record.layer)),
            " ",
            tag("span", f"{record.form}, ρ {record.rho:.4f}{_lost(record)}", class_="muted"),
        ),
        tag("div", _drawing(record), _facts(layer), class_="beside"),
        figures([chart for chart in charts if chart], small=True),
        class_="layer",
        id=layer.anchor,
    )


def _lost(record: LayerRecord) -> str:
    """The most informative error that is recorded."""
    for key, name in ERRORS.items():
        error = getattr(record, key)
        if error is not None:
            return f", {name} {error_text(error)}"
    return ""


def _facts(layer: LayerData) -> Markup:
    record = layer.record
    shape = times(record.shape) + (" (inputs first)" if record.transposed else "")
    facts = [
        ("weight", f"{record.kind} {shape}, {record.dtype}"),
        ("stored", f"{record.num_stored:,} of {record.num_original:,} numbers, {record.storage_text}"),
        ("bytes", f"{record.stored_bytes:,}, {record.bits_per_weight:.2f} bits a weight"),
        ("factors", f"outputs {times(record.output_factors)}, inputs {times(record.input_factors)}"),
        ("padding", " and ".join(map(str, record.padding)) if any(record.padding) else ""),
        ("relative error", error_text(record.relative_error)),
        ("output error", error_text(record.output_error)),
        ("held-out error", error_text(record.held_out_error)),
        ("at the same size", _same_size(record)),
        ("entropy", entropy_text(layer)),
    ]
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts if v), class_="facts")


def _same_size(record: LayerRecord) -> str:
    """The output-weighted error of other methods at the same size."""
    errors = record.same_size or {}
    return ", ".join(f"{name} {error_text(error)}" for name, error in errors.items())


def _drawing(record: LayerRecord) -> Markup | None:
    networks = diagrams_of(record)
    if not networks:
        return None
    caption = "The tensor network: outputs J, inputs I, and the bonds with their dimensions"
    caption += "; the weight is the sum of both." if len(networks) > 1 else "."
    sizes = " and ".join(
        f"bonds {' '.join(str(b.size) for b in network.bonds) or 'none'}" for network in networks
    )
    label = f"Tensor network of {record.layer}: {sizes}"
    drawn = tag(
        "div", network_svg(networks, label), class_="scroll", tabindex="0", role="region", aria_label=label
    )
    return tag("figure", drawn, tag("figcaption", tag("span", caption, class_="muted")), class_="drawing")


def layer_table(manifest: Manifest) -> Markup:
    """One row per layer; replaced layers link to their sections."""
    layers = manifest.layers
    if not layers:
        return tag("p", "No layer was selected.")
    kinds = [kind for kind in map(ErrorKind, reversed(ERRORS)) if _known(manifest, kind)]
    largest = {kind.key: max((kind.of(layer) or 0.0 for layer in layers), default=0.0) for kind in kinds}
    heads = [header_cell("#", "n wide"), header_cell("layer"), header_cell("form", "wide")]
    heads += [header_cell("shape", "wide"), header_cell("bonds D", "wide"), header_cell("before", "n wide")]
    heads += [header_cell("after", "n wide"), header_cell("ρ", "n")]
    heads += [header_cell("stored as", "wide"), header_cell("bytes", "n wide"), header_cell("bits", "n")]
    for kind in kinds:
        heads.append(
            header_cell(kind.name.replace("relative", "rel."), "n" if kind is kinds[-1] else "n wide")
        )
    rows = [_row(k, layer, kinds, largest) for k, layer in enumerate(layers, start=1)]
    caption = "All selected layers. Click a heading to sort and a name to see the layer. "
    caption += "Bars show ρ relative to 1" + (" and errors relative to the largest." if kinds else ".")
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="sortable layers")
    return join(tag("p", caption, class_="note"), scrolled(table, "table of layers"))


def _known(manifest: Manifest, kind: ErrorKind) -> bool:
    return any(kind.of(layer) is not None for layer in manifest.changed)


def _row(k: int, layer: LayerRecord, kinds: list[ErrorKind], largest: dict[str, float]) -> Markup:
    dense = layer.form == "dense"
    written = breakable(layer.layer)
    name = written if dense else tag("a", written, href=f"#layer-{k}")
    errors = [_error(kind, layer, largest[kind.key], kind is kinds[-1]) for kind in kinds]
    bonds = layer.reason if dense else layer.bonds_text()
    widest = 0 if dense else max(layer.bonds, default=0)
    return tag(
        "tr",
        cell(str(k), k, class_="wide"),
        tag("th", name, scope="row", data_v=layer.layer),
        cell(layer.form, class_="wide c"),
        cell(times(layer.shape) + (" ᵀ" if layer.transposed else ""), class_="wide c"),
        tag("td", bonds, data_v=str(widest), class_="wide reason" if dense else "wide"),
        cell(f"{layer.num_original:,}", layer.num_original, class_="wide"),
        cell(f"{layer.num_stored:,}", layer.num_stored, class_="wide"),
        cell(f"{layer.rho:.4f}", layer.rho, layer.rho),
        cell(layer.storage_text, class_="wide c"),
        cell(f"{layer.stored_bytes:,}", layer.stored_bytes, class_="wide"),
        cell(f"{layer.bits_per_weight:.2f}", layer.bits_per_weight),
        join(*errors),
        class_=None if layer.is_changed else "dense",
    )


def _error(kind: ErrorKind, layer: LayerRecord, largest: float, last: bool) -> Markup:
    """The cell of an error; narrow pages show only the last kind, the most informative."""
    error, class_ = kind.of(layer), None if last else "wide"
    if error is None:
        return cell("", -1.0, class_=class_)
    return cell(error_text(error), error, error / largest if largest else 0.0, "error", class_)


def comparison(files: Sequence[FileData]) -> Markup:
    """The comparison of several files, above the report of the first one."""
    kind = shared_error([file.manifest for file in files])
    caveat = (
        _caveat_of_calibration(files) if kind else "Errors are not compared: not every file records them."
    )
    return tag(
        "section",
        tag("p", "mpoc report", class_="kind"),
        tag("h1", f"{len(files)} files compared"),
        _totals(files, kind),
        tag("p", caveat) if caveat else None,
        figures(comparison_charts(files)),
        tag("h2", "Layers by name"),
        _layers(files, kind),
        class_="comparison",
    )


def _caveat_of_calibration(files: Sequence[FileData]) -> str:
    """A caveat where only some files are calibrated: these trade errors of weights for errors of outputs."""
    calibrated = [bool(file.manifest.calibration) for file in files]
    if all(calibrated) or not any(calibrated):
        return ""
    names = ", ".join(file.name for file in files if file.manifest.calibration)
    return (
        "Errors below are errors of weights, the only ones that all files record. Calibrated: "
        f"{names}. Calibration may give larger errors of weights and smaller errors of outputs. "
        "Compare outputs with mpoc eval."
    )


def _totals(files: Sequence[FileData], kind: ErrorKind | None) -> Markup:
    def row(name: str, of: Callable[[FileData], str]) -> Markup:
        return tag("tr", tag("th", name, scope="row"), *(tag("td", of(file), class_="n") for file in files))

    rows = [
        row("ρ of the replaced layers", lambda file: f"{file.manifest.rho:.4f}"),
        row("ρ of all selected layers", _rho_selected),
        row("parameters before", lambda file: f"{file.manifest.source.num_parameters:,}"),
        row("parameters", lambda file: f"{file.manifest.num_parameters:,}"),
        row("on disk before", _bytes_before),
        row("on disk", lambda file: human_bytes(file.nbytes)),
        row("bits a weight, selected layers", lambda file: f"{file.manifest.bits_per_weight:.2f}"),
        row("layers replaced", lambda file: str(len(file.manifest.replaced))),
    ]
    names = common_layers([file.manifest for file in files])
    if kind is not None and names:
        title = f"mean {kind.name}, layers in common: {len(names)}"
        rows.append(row(title, lambda file: error_text(mean_error(file.manifest, kind, names))))
    trained = [_after_training(file) for file in files]
    if any(trained):
        rows.append(row("after training", lambda file: _after_training(file) or "not trained"))
    heads = [tag("td"), *(_head(k, file) for k, file in enumerate(files, start=1))]
    return scrolled(
        tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="totals"), "totals"
    )


def _head(k: int, file: FileData) -> Markup:
    return tag("th", _mark(k), file.name, scope="col", class_="n")


def _rho_selected(file: FileData) -> str:
    return f"{file.manifest.rho_selected:.4f}" if file.manifest.is_complete else "unknown"


def _bytes_before(file: FileData) -> str:
    nbytes = file.manifest.source.nbytes
    return "unknown" if nbytes is None else human_bytes(nbytes)


def _after_training(file: FileData) -> str:
    """The main metric after the last training."""
    training = file.manifest.training
    metric, final = training.get("metric"), training.get("final")
    score = final.get(metric) if isinstance(final, dict) else None
    return f"{metric} {score:.4g} ({training.get('split')})" if isinstance(score, int | float) else ""


def _layers(files: Sequence[FileData], kind: ErrorKind | None) -> Markup:
    """All layers of all files by name; a cell is empty where a file did not select the layer."""
    held = [{layer.layer: layer for layer in file.manifest.layers} for file in files]
    names = list(dict.fromkeys(name for layers in held for name in layers))
    errors = [kind.of(layer) or 0.0 for layers in held for layer in layers.values()] if kind else []
    largest = max(errors, default=0.0)
    span = "2" if kind else "1"
    tops = [
        tag("th", _mark(k), file.name, scope="colgroup", colspan=span)
        for k, file in enumerate(files, start=1)
    ]
    heads = [header_cell("layer")]
    for _ in files:
        heads += [header_cell("ρ", "n"), *([header_cell(kind.name, "n")] if kind else [])]
    rows = [
        tag(
            "tr",
            tag("th", breakable(name), scope="row", data_v=name),
            *(_cells(layers.get(name), kind, largest, tone_of(k)) for k, layers in enumerate(held, start=1)),
        )
        for name in names
    ]
    head = join(tag("tr", tag("td"), *tops), tag("tr", *heads))
    return scrolled(
        tag("table", tag("thead", head), tag("tbody", *rows), class_="sortable"), "layers of all files"
    )


def _mark(k: int) -> Markup:
    return tag("i", class_=f"t-{tone_of(k)} dots".replace("file ", "file-"))


def _cells(layer: LayerRecord | None, kind: ErrorKind | None, largest: float, tone: str) -> Markup:
    """ρ and error of a layer in one file."""
    if layer is None:
        return join(cell("", -1.0), cell("", -1.0) if kind else None)
    rho = "dense" if layer.form == "dense" else f"{layer.rho:.4f}"
    cells = [cell(rho, layer.rho, layer.rho, tone)]
    if kind is not None:
        error = kind.of(layer) or 0.0
        cells.append(cell(error_text(error), error, error / largest if largest else 0.0, tone))
    return join(*cells)
