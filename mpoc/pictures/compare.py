"""Several compressed files on one page: totals, layers by name, size against error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpoc.manifest import LayerRecord
from mpoc.pictures.data import FileData
from mpoc.pictures.figures import (
    ErrorKind,
    common_layers,
    comparison_charts,
    mean_error,
    shared_error,
    tone_of,
)
from mpoc.pictures.markup import Markup, breakable, join, tag
from mpoc.pictures.parts import cell, error_text, figures, header_cell, scrolled
from mpoc.report import human_bytes


def comparison(files: Sequence[FileData]) -> Markup:
    """The part of the page above the report of the first file."""
    kind = shared_error([file.manifest for file in files])
    said = (
        _what_errors_do_not_say(files)
        if kind
        else "Not all of these files hold errors: they are not compared."
    )
    return tag(
        "section",
        tag("p", "mpoc report", class_="kind"),
        tag("h1", f"{len(files)} files compared"),
        _totals(files, kind),
        tag("p", said) if said else None,
        figures(comparison_charts(files)),
        tag("h2", "Layers by name"),
        _layers(files, kind),
        class_="comparison",
    )


def _what_errors_do_not_say(files: Sequence[FileData]) -> str:
    """Where only some were fitted to data: those give up error of the weight for error of the outputs."""
    calibrated = [bool(file.manifest.calibration) for file in files]
    if all(calibrated) or not any(calibrated):
        return ""
    names = ", ".join(file.name for file in files if file.manifest.calibration)
    return (
        f"Errors below are those of weights, which is all that these files share. {names} was fitted to what "
        "layers do on data, and may err more in its weights and less in its outputs: mpoc eval compares them."
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
    return f"{file.manifest.rho_selected:.4f}" if file.manifest.is_complete else "not known"


def _bytes_before(file: FileData) -> str:
    nbytes = file.manifest.source.nbytes
    return "not known" if nbytes is None else human_bytes(nbytes)


def _after_training(file: FileData) -> str:
    """The metric that its last training kept an eye on."""
    training = file.manifest.training
    metric, final = training.get("metric"), training.get("final")
    score = final.get(metric) if isinstance(final, dict) else None
    return f"{metric} {score:.4g} ({training.get('split')})" if isinstance(score, int | float) else ""


def _layers(files: Sequence[FileData], kind: ErrorKind | None) -> Markup:
    """Every layer of any of the files; an empty cell where a file has not selected it."""
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
