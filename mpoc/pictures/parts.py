"""Pieces of the page that several of its parts are made of."""

from __future__ import annotations

from collections.abc import Sequence

from mpoc.pictures.chart import Chart
from mpoc.pictures.markup import Markup, tag
from mpoc.pictures.svg_chart import chart_svg


def title_of(text: str, anchor: str) -> Markup:
    """A heading to jump to."""
    return tag("h2", text, id=anchor)


def figures(charts: Sequence[Chart], small: bool = False) -> Markup | None:
    """Charts side by side, as many as the page is wide."""
    if not charts:
        return None
    size = (280, 200) if small else (344, 208)
    return tag(
        "div", *(figure(chart, *size) for chart in charts), class_="figures small" if small else "figures"
    )


def figure(chart: Chart, width: int, height: int) -> Markup:
    """A chart with its title and legend above and its caption below."""
    keys = [
        tag(
            "span", tag("i", class_=f"t-{one.tone.replace(' ', '-')} {one.style.replace(' ', '-')}"), one.name
        )
        for one in chart.series
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
        value: what it shows.
        key: by what its column is sorted, and it is a figure; None for the text.
        bar: length of a bar below it, from 0 to 1; None for none.
        tone: of the bar.
        class_: "wide" for what narrow pages leave out.
    """
    drawn = None
    if bar is not None:
        length = f"width:{100 * min(max(bar, 0.0), 1.0):.1f}%"
        drawn = tag("span", tag("span", style=length, class_=f"t-{tone.replace(' ', '-')}"), class_="bar")
    classes = " ".join(filter(None, [None if key is None else "n", class_]))
    return tag("td", value, drawn, class_=classes or None, data_v=value if key is None else str(key))


def header_cell(name: str, class_: str | None = None) -> Markup:
    """Of a column that is sorted by a click, or by Enter on its button."""
    return tag("th", tag("button", name, type="button"), scope="col", class_=class_)


def scrolled(table: Markup, label: str) -> Markup:
    """A table that moves sideways by itself where the page is narrow, by touch and by keyboard."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def error_text(error: float | None) -> str:
    """``0.1234``; ``1.2e-05`` where that would hide it; nothing where it is not known."""
    if error is None:
        return ""
    return f"{error:.1e}" if 0 < error < 1e-4 else f"{error:.4f}" if error else "0"
