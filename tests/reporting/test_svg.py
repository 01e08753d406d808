"""Charts as SVG: well-formed, points where they belong, names escaped."""

from __future__ import annotations

from xml.etree import ElementTree

from mpoc.reporting.charts import Axis, Chart, Mark, Series
from mpoc.reporting.svg import chart_svg
from tests.reporting.files import HOSTILE

LINE = Series("stored", ((1.0, 0.5), (10.0, 0.25), (100.0, 0.125)), "marked line", "stored")


def chart(*series: Series, scale: str = "log", mark: Mark | None = None) -> Chart:
    return Chart("Title", "Caption", Axis("index", scale), Axis("value", scale), series, mark)


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart_svg(chart))


def test_points_use_logarithmic_positions() -> None:
    places = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in drawn(chart(LINE)).iter("circle")]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert abs((x2 - x1) - (x3 - x2)) < 0.3 and x1 < x2
    assert abs((y2 - y1) - (y3 - y2)) < 0.3 and y1 < y2


def test_columns_start_at_zero() -> None:
    columns = Series("n", ((1.0, 2.0), (2.0, 4.0), (3.0, 0.0)), "columns", "stored", ("a", "b", "c"))
    one = Chart("T", "C", Axis("layer", unit="whole"), Axis("", from_zero=True), (columns,))
    rects = list(drawn(one).iter("rect"))
    heights = [float(rect.get("height", "")) for rect in rects]
    assert heights[2] == 0.0 and abs(heights[1] - 2 * heights[0]) < 0.3
    assert [rect.findtext("title") for rect in rects] == ["a", "b", "c"]


def test_draws_the_mark_at_its_value() -> None:
    root = drawn(chart(LINE, mark=Mark(10.0, "D = 10")))
    middle = [float(c.get("cx", "")) for c in root.iter("circle")][1]
    (line,) = [path for path in root.iter("path") if path.get("class") == "cut"]
    assert line.get("d", "").startswith(f"M{middle:.1f} ".replace(".0 ", " "))
    assert "D = 10" in [text.text for text in root.iter("text")]


def test_has_a_title_and_description() -> None:
    root = drawn(chart(LINE))
    assert (root.get("role"), root.get("aria-label")) == ("img", "Title. Caption")


def test_escapes_names() -> None:
    series = Series(HOSTILE, ((1.0, 1.0),), "dots", "stored", (HOSTILE,))
    one = Chart(HOSTILE, HOSTILE, Axis(HOSTILE), Axis(HOSTILE), (series,), Mark(1.0, HOSTILE))
    root = drawn(one)
    assert HOSTILE in [text.text for text in root.iter("text")]
    assert not list(root.iter("img")) and not list(root.iter("script"))


def test_draws_one_point_and_none() -> None:
    assert len(list(drawn(chart(Series("a", ((1.0, 1.0),), "line", "stored"))).iter("path"))) > 1
    assert not list(drawn(chart(scale="linear")).iter("circle"))
