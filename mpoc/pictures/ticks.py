"""Where an axis begins and ends, and which of its values are written, and how."""

from __future__ import annotations

import math

from mpoc.pictures.chart import Axis
from mpoc.report import human_bytes

# Of a logarithmic axis, in powers of ten: what is nearly flat is to look flat.
_LEAST_SPAN = 0.6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def limits(axis: Axis, values: list[float], room: float = 0.04) -> tuple[float, float]:
    """The ends of ``axis``; on a logarithmic one all ``values`` are above 0.

    Args:
        axis: what is to hold the values.
        values: all of them.
        room: share of the axis that stays free at each end, but for zero.
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
    """Where ``value`` stands between the ends, from 0 to 1."""
    low, high = ends
    if axis.scale == "log":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def ticks(axis: Axis, ends: tuple[float, float], most: int = 5) -> list[float]:
    """The values that are written, at most ``most``."""
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
        found = [value for value in fine if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    return found


def written(axis: Axis, value: float) -> str:
    """A tick's value for people."""
    if axis.unit == "bytes":
        return human_bytes(round(value))
    if axis.unit == "count":
        return counted(value)
    exponent = round(math.log10(value)) if value > 0 else 0
    if axis.scale == "log" and (exponent < -2 or exponent > 3) and math.isclose(value, 10.0**exponent):
        return "10" + str(exponent).translate(_SUPERSCRIPTS)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def counted(value: float) -> str:
    """``1234567`` → ``1.23M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
