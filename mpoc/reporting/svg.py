"""Charts as inline SVG, their axes and ticks, and HTML as text.

Text that is not markup is always escaped, since names come from untrusted files.  Colours and fonts are
classes here and values in ``page.css``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from html import escape

from mpoc.reporting.charts import Axis, Chart, Series
from mpoc.runtime.formatting import human_bytes

_SPLIT = re.compile(r"([._/])")
_EMPTY = ("circle", "line", "path", "rect")

# Least span of a logarithmic axis in powers of ten, so that nearly flat values look flat.
_LEAST_SPAN = 0.6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Widths of a character of 11 px, in any font of the page.
_CHARACTER, _BOLD = 6.4, 7.6
_BOTTOM, _RIGHT = 38, 14


class Markup(str):
    """Text that is markup already and is not escaped."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element; ``tag("a", "x < y", href="#x", class_="n")`` → ``<a href="#x" class="n">x &lt; y</a>``.

    Args:
        name: name of the element.
        children: :class:`Markup` as it is, other text escaped, None omitted.
        attributes: a final underscore is dropped, others become hyphens; None and False are omitted, True
            has no value, numbers are shortened.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inner = join(*children)
    return Markup(
        f"<{name}{written}>{inner}</{name}>" if inner or name not in _EMPTY else f"<{name}{written}/>"
    )


def join(*children: str | None) -> Markup:
    """Concatenate markup; other text is escaped, None omitted."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children if child)
    )


def breakable(name: str) -> Markup:
    """A dotted name that may wrap after a dot, an underscore or a slash."""
    return join(
        *(part if k % 2 == 0 else Markup(escape(part) + "<wbr>") for k, part in enumerate(_SPLIT.split(name)))
    )


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escape(value) if isinstance(value, str) else short_length(value)}"'


def short_length(value: float) -> str:
    """A length in a drawing, with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def limits(axis: Axis, values: list[float], room: float = 0.04) -> tuple[float, float]:
    """The ends of ``axis``; on a logarithmic one all ``values`` are above 0.

    Args:
        axis: scale and unit of the values.
        values: all values along the axis.
        room: share of the axis that stays free at each end, except at zero.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis.scale == "log":
        exponents = math.log10(low), math.log10(high)
        span = exponents[1] - exponents[0]
        space = max(room * span, (_LEAST_SPAN - span) / 2)
        return 10 ** (exponents[0] - space), 10 ** (exponents[1] + space)
    low = 0.0 if axis.from_zero else low
    space = room * (high - low) or (0.5 if axis.unit == "whole" else 0.1 * abs(high) or 1.0)
    return (low if axis.from_zero else low - space), high + space


def place(axis: Axis, ends: tuple[float, float], value: float) -> float:
    """Position of ``value`` between the ends, from 0 to 1."""
    low, high = ends
    if axis.scale == "log":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def ticks(axis: Axis, ends: tuple[float, float], most: int = 5) -> list[float]:
    """The values of the ticks, at most ``most``."""
    return _log_ticks(*ends, most) if axis.scale == "log" else _linear_ticks(axis, *ends, most)


def _linear_ticks(axis: Axis, low: float, high: float, most: int) -> list[float]:
    power = 10 ** math.floor(math.log10((high - low) / most))
    for step in (factor * power for factor in (1, 2, 5, 10, 20)):
        if axis.unit == "whole":
            step = max(1.0, round(step))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = last - first + 1
    if decades >= 3:
        stride = math.ceil(decades / most)
        return [10.0**k for k in range(first, last + 1, stride)]
    for steps in ((1, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        fine = [m * 10.0**k for k in range(first - 1, last + 2) for m in steps]
        ticks = [value for value in fine if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            break
    return ticks


def tick_label(axis: Axis, value: float) -> str:
    """The text of a tick."""
    if axis.unit == "bytes":
        return human_bytes(round(value))
    if axis.unit == "count":
        return short_count(value)
    exponent = round(math.log10(value)) if value > 0 else 0
    if axis.scale == "log" and (exponent < -2 or exponent > 3) and math.isclose(value, 10.0**exponent):
        return "10" + str(exponent).translate(_SUPERSCRIPTS)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def short_count(value: float) -> str:
    """``1234567`` → ``1.23M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


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
        """Position of a point in the viewBox."""
        return self.x(x), self.y(y)

    def x(self, value: float) -> float:
        """Distance from the left."""
        return self.left + place(self.chart.x, self.x_ends, value) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Distance from the top."""
        return self.bottom - place(self.chart.y, self.y_ends, value) * (self.bottom - self.top)


def chart_svg(chart: Chart, width: int = 360, height: int = 216) -> Markup:
    """The chart as inline SVG, without title, caption and legend, which are HTML."""
    y_ends = limits(chart.y, chart.values(1))
    y_ticks = ticks(chart.y, y_ends)
    widest = max((len(tick_label(chart.y, value)) for value in y_ticks), default=0)
    x_ends = _x_ends(chart)
    frame = _Frame(
        chart, widest * _CHARACTER + 10, width - _RIGHT, _top(chart), height - _BOTTOM, x_ends, y_ends
    )
    drawn = [_draw(frame, series) for series in chart.series if series.points]
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
    """The ends of the x axis; columns need half a step at each end."""
    values = chart.values(0)
    if any(series.style == "columns" for series in chart.series):
        return min(values, default=1) - 0.6, max(values, default=1) + 0.6
    return limits(chart.x, values)


def _y_axis(frame: _Frame, values: list[float]) -> Markup:
    lines = Markup(
        "".join(
            f"M{short_length(frame.left)} {short_length(frame.y(v))}H{short_length(frame.right)}"
            for v in values
        )
    )
    texts = [
        tag("text", tick_label(frame.chart.y, v), x=frame.left - 6, y=frame.y(v) + 4, class_="e")
        for v in values
    ]
    return join(tag("path", d=lines, class_="grid"), *texts, tag("text", frame.chart.y.label, x=0, y=11))


def _x_axis(frame: _Frame) -> Markup:
    axis = frame.chart.x
    base = tag(
        "path",
        d=f"M{short_length(frame.left)} {short_length(frame.bottom)}H{short_length(frame.right)}",
        class_="axis",
    )
    texts: list[Markup] = []
    end = -1.0
    for value in ticks(axis, frame.x_ends):
        text = tick_label(axis, value)
        half = len(text) * _CHARACTER / 2
        middle = min(max(frame.x(value), half), frame.right + _RIGHT - half)
        if middle - half > end:
            texts.append(tag("text", text, x=middle, y=frame.bottom + 17, class_="m"))
            end = middle + half + 6
    middle = (frame.left + frame.right) / 2
    return join(base, *texts, tag("text", axis.label, x=middle, y=frame.bottom + 33, class_="m"))


def _mark(frame: _Frame) -> Markup | None:
    """The vertical mark, with its label above the frame."""
    mark = frame.chart.mark
    if mark is None:
        return None
    x, length = frame.x(mark.x), len(mark.label) * _BOLD
    middle = min(max(x, frame.left + length / 2), frame.right + _RIGHT - length / 2)
    line = f"M{short_length(x)} {short_length(frame.top - 2)}V{short_length(frame.bottom)}"
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
        line = "M" + "L".join(f"{short_length(x)} {short_length(y)}" for x, y in places)
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
