"""The share-out by equal marginal gain, against trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.budget import allocate

CURVE = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100).map(float)), min_size=1, max_size=5)
CURVES = st.lists(CURVE, min_size=1, max_size=4)
SOME = settings(max_examples=120, deadline=None, derandomize=True)


def cost(curves: list[list[tuple[int, float]]], taken: tuple[int, ...] | list[int]) -> tuple[int, float]:
    chosen = [curve[k] for curve, k in zip(curves, taken, strict=True)]
    return sum(size for size, _ in chosen), sum(error for _, error in chosen)


def best(curves: list[list[tuple[int, float]]], budget: int) -> float:
    every = (cost(curves, taken) for taken in product(*(range(len(curve)) for curve in curves)))
    return min(error for size, error in every if size <= budget)


@pytest.mark.slow
@SOME
@given(CURVES, st.integers(0, 120))
def test_never_exceeds_the_budget(curves: list[list[tuple[int, float]]], budget: int) -> None:
    taken = allocate(curves, budget)
    least = sum(min(size for size, _ in curve) for curve in curves)
    assert (taken is None) == (least > budget)
    if taken is not None:
        assert cost(curves, taken)[0] <= budget


@pytest.mark.slow
@SOME
@given(CURVES, st.integers(0, 120))
def test_is_close_to_the_optimum(curves: list[list[tuple[int, float]]], budget: int) -> None:
    """Within the largest step of one curve: what a convex share-out can lose to whole numbers."""
    taken = allocate(curves, budget)
    if taken is not None:
        largest = max(max(error for _, error in curve) - min(e for _, e in curve) for curve in curves)
        assert cost(curves, taken)[1] <= best(curves, budget) + largest


@pytest.mark.slow
@SOME
@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_is_optimal_on_convex_curves(gains: list[list[int]], data: st.DataObject) -> None:
    curves = []
    for falling in gains:
        ordered = sorted(falling, reverse=True)
        curves.append([(7 * k, float(sum(ordered[k:]))) for k in range(len(ordered) + 1)])
    budget = data.draw(st.integers(0, 7 * sum(map(len, gains)) + 10))
    taken = allocate(curves, budget)
    assert taken is not None
    assert cost(curves, taken)[1] == best(curves, budget)


def test_fills_the_remainder_above_the_hull() -> None:
    curves = [[(0, 10.0), (4, 9.0), (10, 0.0)]]
    assert allocate(curves, 10) == [2]
    assert allocate(curves, 9) == [1]


def test_expensive_layer_does_not_block_others() -> None:
    curves = [[(0, 100.0), (50, 0.0)], [(0, 10.0), (5, 0.0)]]
    assert allocate(curves, 20) == [0, 1]


@pytest.mark.parametrize("budget", [0, 3, 8])
def test_is_deterministic(budget: int) -> None:
    curves = [[(0, 5.0), (3, 1.0)], [(0, 5.0), (3, 1.0)], [(0, 5.0), (2, 2.0)]]
    assert allocate(curves, budget) == allocate(curves, budget)
