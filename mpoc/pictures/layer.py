"""The pictures of one replaced layer: its network, the spectra of its bonds, its entropies."""

from __future__ import annotations

from mpoc.manifest import LayerRecord
from mpoc.pictures.data import LayerData
from mpoc.pictures.figures import ERRORS, entropy_chart, entropy_text, spectrum_chart
from mpoc.pictures.markup import Markup, breakable, tag
from mpoc.pictures.network import networks_of
from mpoc.pictures.parts import error_text, figures
from mpoc.pictures.svg_network import network_svg
from mpoc.report import times


def layer_section(layer: LayerData) -> Markup:
    """Closed until it is asked for."""
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
    """The most telling error that is known."""
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
        ("stored", f"{record.num_stored:,} of {record.num_original:,} numbers, {record.stored_dtype}"),
        ("factors", f"outputs {times(record.output_factors)}, inputs {times(record.input_factors)}"),
        ("padding", " and ".join(map(str, record.padding)) if any(record.padding) else ""),
        ("relative error", error_text(record.relative_error)),
        ("output error", error_text(record.output_error)),
        ("held-out error", error_text(record.held_out_error)),
        ("in the same bytes", _same_size(record)),
        ("entropy", entropy_text(layer)),
    ]
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts if v), class_="facts")


def _same_size(record: LayerRecord) -> str:
    """The error of other methods at the same size, as the network's output feels it."""
    found = record.same_size or {}
    return ", ".join(f"{name} {error_text(error)}" for name, error in found.items())


def _drawing(record: LayerRecord) -> Markup | None:
    networks = networks_of(record)
    if not networks:
        return None
    caption = "The tensor network: outputs J, inputs I, and the bonds with their dimensions"
    caption += "; the weight is the sum of both." if len(networks) > 1 else "."
    sizes = " and ".join(f"bonds {' '.join(str(b.size) for b in one.bonds) or 'none'}" for one in networks)
    label = f"Tensor network of {record.layer}: {sizes}"
    drawn = tag(
        "div", network_svg(networks, label), class_="scroll", tabindex="0", role="region", aria_label=label
    )
    return tag("figure", drawn, tag("figcaption", tag("span", caption, class_="muted")), class_="drawing")
