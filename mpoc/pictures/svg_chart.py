"""A chart as inline SVG.  Colours and fonts are the page's: classes here, values in ``page.css``."""

from __future__ import annotations

from dataclasses import dataclass

from mpoc.pictures.chart import Chart, Series
from mpoc.pictures.markup import Markup, join, short, tag
from mpoc.pictures.ticks import limits, place, ticks, written

# Of a text of 11 px, in any of the page's fonts.
_CHARACTER, _BOLD = 6.4, 7.6
_BOTTOM, _RIGHT = 38, 14


@dataclass(frozen=True)
class _Frame:
    """The inside of a chart, in units of its viewBox."""

    chart: Chart
    left: float
    right: float
    top: float
    bottom: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point stands."""
        return self.x(x), self.y(y)

    def x(self, value: float) -> float:
        """From the left."""
        return self.left + place(self.chart.x, self.x_ends, value) * (self.right - self.left)

    def y(self, value: float) -> float:
        """From the top."""
        return self.bottom - place(self.chart.y, self.y_ends, value) * (self.bottom - self.top)


def chart_svg(chart: Chart, width: int = 360, height: int = 216) -> Markup:
    """The chart without title, caption and legend, which are the page's."""
    y_ends = limits(chart.y, chart.values(1))
    y_ticks = ticks(chart.y, y_ends)
    widest = max((len(written(chart.y, value)) for value in y_ticks), default=0)
    x_ends = _x_ends(chart)
    frame = _Frame(
        chart, widest * _CHARACTER + 10, width - _RIGHT, _top(chart), height - _BOTTOM, x_ends, y_ends
    )
    drawn = [_draw(frame, one) for one in chart.series if one.points]
    label = f"{chart.title}. {chart.caption}"
    return tag(
        "svg",
        _y_axis(frame, y_ticks),
        _x_axis(frame),
        _mark(frame),
        *drawn,
        class_="chart",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def _top(chart: Chart) -> float:
    """Room for a line of the axis's label, and one of the mark's."""
    return 8 + (12 if chart.y.label else 0) + (14 if chart.mark else 0)


def _x_ends(chart: Chart) -> tuple[float, float]:
    """Columns take half a place at each end."""
    values = chart.values(0)
    if any(one.style == "columns" for one in chart.series):
        return min(values, default=1) - 0.6, max(values, default=1) + 0.6
    return limits(chart.x, values)


def _y_axis(frame: _Frame, values: list[float]) -> Markup:
    lines = Markup("".join(f"M{short(frame.left)} {short(frame.y(v))}H{short(frame.right)}" for v in values))
    texts = [
        tag("text", written(frame.chart.y, v), x=frame.left - 6, y=frame.y(v) + 4, class_="e") for v in values
    ]
    return join(tag("path", d=lines, class_="grid"), *texts, tag("text", frame.chart.y.label, x=0, y=11))


def _x_axis(frame: _Frame) -> Markup:
    axis = frame.chart.x
    base = tag("path", d=f"M{short(frame.left)} {short(frame.bottom)}H{short(frame.right)}", class_="axis")
    texts: list[Markup] = []
    end = -1.0
    for value in ticks(axis, frame.x_ends):
        text = written(axis, value)
        half = len(text) * _CHARACTER / 2
        middle = min(max(frame.x(value), half), frame.right + _RIGHT - half)
        if middle - half > end:
            texts.append(tag("text", text, x=middle, y=frame.bottom + 17, class_="m"))
            end = middle + half + 6
    middle = (frame.left + frame.right) / 2
    return join(base, *texts, tag("text", axis.label, x=middle, y=frame.bottom + 33, class_="m"))


def _mark(frame: _Frame) -> Markup | None:
    """The line, and its label above the frame where no point is."""
    mark = frame.chart.mark
    if mark is None:
        return None
    x, length = frame.x(mark.x), len(mark.label) * _BOLD
    middle = min(max(x, frame.left + length / 2), frame.right + _RIGHT - length / 2)
    line = f"M{short(x)} {short(frame.top - 2)}V{short(frame.bottom)}"
    text = tag("text", mark.label, x=middle, y=frame.top - 6, class_="m cut")
    return join(tag("path", d=line, class_="cut"), text)


def _draw(frame: _Frame, series: Series) -> Markup:
    tone = f"t-{series.tone.replace(' ', '-')}"
    if series.style == "columns":
        return tag("g", *_columns(frame, series), class_=f"columns {tone}")
    places = [frame.at(*point) for point in series.points]
    names = series.names or (None,) * len(places)
    parts: list[Markup] = []
    if series.style.endswith("line"):
        line = "M" + "L".join(f"{short(x)} {short(y)}" for x, y in places)
        parts.append(tag("path", d=line, class_="dotted" if series.style == "dotted line" else "curve"))
    if series.style in ("dots", "marked line"):
        radius = 2.4 if len(places) > 12 else 3.2
        parts += [
            tag("circle", tag("title", name) if name else None, cx=x, cy=y, r=radius)
            for (x, y), name in zip(places, names, strict=True)
        ]
    return tag("g", *parts, class_=tone)


def _columns(frame: _Frame, series: Series) -> list[Markup]:
    step = (frame.right - frame.left) / (frame.x_ends[1] - frame.x_ends[0])
    width = max(0.8, min(28.0, step * 0.8))
    names = series.names or ("",) * len(series.points)
    return [
        tag(
            "rect",
            tag("title", name) if name else None,
            x=frame.x(x) - width / 2,
            y=frame.y(y),
            width=width,
            height=max(0.0, frame.bottom - frame.y(y)),
        )
        for (x, y), name in zip(series.points, names, strict=True)
    ]
