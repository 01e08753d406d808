"""A chart as plain data, which the page draws as inline SVG and matplotlib into files."""

from __future__ import annotations

from dataclasses import dataclass

# What a colour stands for; "file 1" and so on are those of a comparison.
TONES = ("stored", "original", "bound", "error")
STYLES = ("line", "dots", "columns", "marked line", "dotted line")


@dataclass(frozen=True)
class Axis:
    """One side of a chart."""

    label: str
    scale: str = "linear"  # or "log"
    unit: str = ""  # "count": 1.2k, "bytes": 1.2 MB, "whole": ticks at whole numbers only
    from_zero: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str  # one of STYLES
    tone: str  # one of TONES, or "file 1", …
    names: tuple[str, ...] = ()  # of the points, where they have any


@dataclass(frozen=True)
class Mark:
    """A vertical line."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What is drawn; ``caption`` tells what it shows."""

    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    mark: Mark | None = None

    def values(self, side: int) -> list[float]:
        """All coordinates along x (0) or y (1), the mark's among them."""
        found = [point[side] for one in self.series for point in one.points]
        return found + ([self.mark.x] if self.mark and side == 0 else [])
