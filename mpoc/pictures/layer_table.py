"""The table of all layers of a file, sorted by any column."""

from __future__ import annotations

from mpoc.manifest import LayerRecord, Manifest
from mpoc.pictures.figures import ERRORS, ErrorKind
from mpoc.pictures.markup import Markup, breakable, join, tag
from mpoc.pictures.parts import cell, error_text, header_cell, scrolled
from mpoc.report import times


def layer_table(manifest: Manifest) -> Markup:
    """A row a layer; those replaced link to their part of the page."""
    layers = manifest.layers
    if not layers:
        return tag("p", "No layer was selected.")
    kinds = [kind for kind in map(ErrorKind, reversed(ERRORS)) if _known(manifest, kind)]
    largest = {kind.key: max((kind.of(layer) or 0.0 for layer in layers), default=0.0) for kind in kinds}
    heads = [header_cell("#", "n wide"), header_cell("layer"), header_cell("form", "wide")]
    heads += [header_cell("shape", "wide"), header_cell("bonds D", "wide"), header_cell("before", "n wide")]
    heads += [header_cell("after", "n wide"), header_cell("ρ", "n")]
    for kind in kinds:
        heads.append(
            header_cell(kind.name.replace("relative", "rel."), "n" if kind is kinds[-1] else "n wide")
        )
    rows = [_row(k, layer, kinds, largest) for k, layer in enumerate(layers, start=1)]
    caption = "All selected layers. A column's heading sorts by it; a layer's name leads to its pictures. "
    caption += "Bars: ρ of 1" + (", and each error of the largest in its column." if kinds else ".")
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="sortable layers")
    return join(tag("p", caption, class_="note"), scrolled(table, "table of layers"))


def _known(manifest: Manifest, kind: ErrorKind) -> bool:
    return any(kind.of(layer) is not None for layer in manifest.replaced)


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
        join(*errors),
        class_="dense" if dense else None,
    )


def _error(kind: ErrorKind, layer: LayerRecord, largest: float, last: bool) -> Markup:
    """Narrow pages show the last kind alone, which tells most."""
    error, class_ = kind.of(layer), None if last else "wide"
    if error is None:
        return cell("", -1.0, class_=class_)
    return cell(error_text(error), error, error / largest if largest else 0.0, "error", class_)
