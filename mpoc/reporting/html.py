"""The report of a compressed file as one self-contained HTML page, which loads nothing from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from mpoc.io.atomic import write_text
from mpoc.io.manifest import Manifest
from mpoc.reporting.charts import layer_charts, training_charts
from mpoc.reporting.contents import FileData, read_files
from mpoc.reporting.html_sections import comparison, figures, layer_section, layer_table, title_of
from mpoc.reporting.remarks import headline, likeness_text, remarks
from mpoc.reporting.svg import Markup, join, tag
from mpoc.runtime.formatting import human_bytes

# The browser may load nothing from outside, whatever the page contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(path: Path, output: Path, others: Sequence[Path] = ()) -> None:
    """Write the page of ``path``, compared with ``others``; the file appears complete or not at all.

    Args:
        path: a compressed file or directory.
        output: the HTML file.
        others: compressed files to compare with.

    Raises:
        UsageError, MpocError: as :func:`mpoc.reporting.contents.read_files`.
    """
    write_text(output, page(read_files(path, others)))


def page(shown: Sequence[FileData]) -> str:
    """The HTML of the first of ``shown``, compared with the others."""
    script = _asset("js")
    title = " and ".join(file.name for file in shown)
    body = join(
        comparison(shown) if len(shown) > 1 else None,
        _report(shown[0]),
        tag("script", Markup(script)),
    )
    return document(f"{title}: mpoc report", body)


def document(title: str, body: Markup) -> str:
    """A page of its own, in the style of the reports."""
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", Markup(_asset("css"))),
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _asset(kind: str) -> str:
    return files("mpoc.reporting.assets").joinpath(f"page.{kind}").read_text("utf-8")


def _report(file: FileData) -> Markup:
    manifest = file.manifest
    lines = remarks(manifest)
    return tag(
        "main",
        _header(file),
        _totals(file),
        tag("ul", *(tag("li", line) for line in lines), class_="remarks") if lines else None,
        figures(layer_charts(manifest)),
        _training(manifest),
        tag("h2", "Layers"),
        layer_table(manifest),
        _each_layer(file),
        _unchanged(manifest),
        tag("footer", f"{manifest.tool or 'mpoc'}. Layer kinds read from {manifest.kinds_from}."),
    )


def _header(file: FileData) -> Markup:
    source, said = file.manifest.source.name, headline(file.manifest)
    return tag(
        "header",
        tag("p", "mpoc report", class_="kind"),
        tag("h1", file.name),
        tag("p", said, class_="headline") if said else None,
        tag("p", f"made from {source}", class_="muted") if source else None,
    )


def _totals(file: FileData) -> Markup:
    """The totals; of a network that is rounded and holds no cores, no ratios of parameters."""
    manifest = file.manifest
    is_rounded = not manifest.replaced and bool(manifest.changed)
    tiles = [] if is_rounded else _ratios(manifest)
    bytes_before = manifest.source.nbytes
    of = (
        _from(human_bytes(bytes_before), file.nbytes, bytes_before)
        if bytes_before
        else "original size not recorded"
    )
    tiles.append(("on disk", human_bytes(file.nbytes), of))
    if manifest.layers:
        stored, bits = human_bytes(manifest.selected_bytes[1]), f"{manifest.bits_per_weight:.2f}"
        tiles.append(("bits a weight", bits, f"{stored} for all selected layers"))
    likeness = likeness_text(manifest.calibration.get("likeness", {}).get("this", {}))
    if likeness:
        first, _, rest = likeness.partition(", ")
        name, _, value = first.partition(" ")
        note = " ".join(filter(None, ("to the dense network, on held-out data;", rest))).rstrip(";")
        tiles.append((name, value, note))
    selected = f"of {len(manifest.layers)} selected" if manifest.is_complete else "in this file"
    kind = "rounded" if is_rounded else "replaced"
    count = len(manifest.changed if is_rounded else manifest.replaced)
    tiles.append((f"layers {kind}", str(count), selected))
    return tag("dl", *(_tile(*tile) for tile in tiles), class_="tiles")


def _ratios(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Tiles of the parameters."""
    before = sum(layer.num_original for layer in manifest.replaced)
    after = sum(layer.num_stored for layer in manifest.replaced)
    tiles = [("ρ of the replaced layers", f"{manifest.rho:.4f}", f"{before:,} → {after:,} parameters")]
    if manifest.is_complete:
        tiles.append(
            ("ρ of all selected layers", f"{manifest.rho_selected:.4f}", "including layers left dense")
        )
    was, now = manifest.source.num_parameters, manifest.num_parameters
    return [*tiles, ("parameters, whole model", f"{now:,}", _from(f"{was:,}", now, was))]


def _from(text: str, now: int, was: int) -> str:
    return f"from {text}, {now / was:.1%}" if was else f"from {text}"


def _tile(name: str, value: str, note: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="muted"))


def _training(manifest: Manifest) -> Markup | None:
    charts = training_charts(manifest.training)
    return join(tag("h2", "Training"), figures(charts)) if charts else None


def _each_layer(file: FileData) -> Markup | None:
    if not file.layers:
        return None
    buttons = tag(
        "p",
        tag("button", "Open all", type="button", data_open="1"),
        tag("button", "Close all", type="button", data_open="0"),
        class_="tools",
    )
    sections = [layer_section(layer) for layer in file.layers]
    return join(title_of("Each replaced layer", "each"), buttons, *sections)


def _unchanged(manifest: Manifest) -> Markup | None:
    """The tensors that are stored unchanged."""
    counts = Counter(manifest.left_alone.values())
    parts = [f"{count} {reason}" for reason, count in counts.most_common()]
    if manifest.vectors:
        parts.append(f"{manifest.vectors} vectors and scalars (biases, norms)")
    if not parts:
        return None
    listed = [
        *manifest.left_alone.items(),
        *((name, f"tied to {first}") for name, first in manifest.tied.items()),
    ]
    items = [tag("li", tag("b", name), f" {reason}") for name, reason in listed]
    more = tag("details", tag("summary", "Names"), tag("ul", *items)) if items else None
    return join(tag("h2", "Unchanged tensors"), tag("p", "; ".join(parts)), more)
