"""Axes: their ends hold the values, their ticks are few and lie within."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpoc.reporting.charts import Axis
from mpoc.reporting.svg import limits, place, short_count, tick_label, ticks

SOME = settings(max_examples=150, deadline=None, derandomize=True)
AXES = st.sampled_from(
    [Axis("x"), Axis("x", from_zero=True), Axis("x", "log"), Axis("x", unit="whole"), Axis("x", unit="bytes")]
)


@pytest.mark.slow
@SOME
@given(AXES, st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=6))
def test_ticks_are_few_rising_and_in_range(axis: Axis, values: list[float]) -> None:
    assume(len(set(values)) == 1 or (max(values) - min(values)) > 1e-6 * max(values))
    ends = limits(axis, values)
    assert all(-1e-9 <= place(axis, ends, value) <= 1 + 1e-9 for value in values)
    found = ticks(axis, ends)
    assert len(found) <= 5
    assert all(before < after for before, after in itertools.pairwise(found))
    assert all(-1e-6 <= place(axis, ends, value) <= 1 + 1e-6 for value in found)
    if axis.unit == "whole":
        assert all(value == round(value) for value in found)
    if axis.scale == "log":
        assert len(found) > 0


@pytest.mark.parametrize(
    ("axis", "ends", "expected"),
    [
        (Axis("x"), (0.0, 1.04), [0, 0.5, 1.0]),
        (Axis("x", unit="whole"), (0.5, 3.5), [1, 2, 3]),
        (Axis("x", "log"), (0.5, 2000.0), [1, 10, 100, 1000]),
        (Axis("x", "log"), (0.9, 12.0), [1, 2, 5, 10]),
    ],
)
def test_picks_round_numbers(axis: Axis, ends: tuple[float, float], expected: list[float]) -> None:
    assert ticks(axis, ends) == pytest.approx(expected)


def test_keeps_zero_as_an_end() -> None:
    assert limits(Axis("x", from_zero=True), [3.0, 5.0])[0] == 0.0
    assert limits(Axis("x", from_zero=True), [0.0, 0.0]) == (0.0, 1.0)


def test_flat_values_look_flat() -> None:
    low, high = limits(Axis("x", "log"), [0.25, 0.26])
    assert high / low > 3


@pytest.mark.parametrize(
    ("axis", "value", "text"),
    [
        (Axis("x"), 0.30000000000000004, "0.3"),
        (Axis("x"), 12000.0, "12,000"),
        (Axis("x", "log"), 1e-5, "10⁻⁵"),
        (Axis("x", "log"), 0.01, "0.01"),
        (Axis("x", "log"), 20.0, "20"),
        (Axis("x", unit="bytes"), 1.5e6, "1.5 MB"),
        (Axis("x", unit="count"), 1.5e6, "1.5M"),
        (Axis("x"), -0.5, "-0.5"),
    ],
)
def test_formats_ticks(axis: Axis, value: float, text: str) -> None:
    assert tick_label(axis, value) == text


def test_picks_whole_numbers_for_counts() -> None:
    assert [short_count(value) for value in (0, 12, 1234, 5e5, 2e9)] == ["0", "12", "1.23k", "500k", "2G"]
