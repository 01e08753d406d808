"""Which ratios are tried, and which trial is chosen, on made-up curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.search import Bisection, Trial

SOME = settings(max_examples=100, deadline=None, derandomize=True)


def searched(
    drop: Callable[[float], float],
    max_drop: float = 1.0,
    least: float = 0.0,
    nbytes: Callable[[float], int] = lambda ratio: round(1e6 * ratio),
) -> Bisection:
    """The search on a network whose metric drops so."""
    search = Bisection(max_drop, least)
    while (ratio := search.next_budget()) is not None:
        search.trials.append(Trial(ratio, nbytes(ratio), drop(ratio), {}))
    return search


@SOME
@given(st.floats(0.005, 0.98), st.floats(0, 0.5))
def test_finds_a_threshold(threshold: float, least: float) -> None:
    search = searched(lambda ratio: 0.5 if ratio >= threshold else 7.0, least=least)
    assert search.chosen is not None and search.keeps(search.chosen)
    best = max(threshold, least)
    assert best <= search.chosen.budget <= best + max(0.02 * search.chosen.budget, 0.004) + 0.001
    assert len(search.trials) <= 8
    assert all(least < trial.budget < 1 for trial in search.trials)


_FOUND = st.tuples(st.one_of(st.floats(-1, 3), st.just(math.nan)), st.integers(1, 5))


@pytest.mark.slow
@SOME
@given(st.lists(_FOUND, min_size=8, max_size=8))
def test_returns_the_smallest_accepted_trial_of_any_curve(found: list[tuple[float, int]]) -> None:
    """``found``: drop and bytes of each trial, in no order at all."""
    drops, sizes = ([one[k] for one in found] for k in (0, 1))
    search = searched(lambda _: drops.pop(), nbytes=lambda _: int(sizes.pop()))
    kept = [trial for trial in search.trials if trial.drop <= 1.0]
    assert len({trial.budget for trial in search.trials}) == len(search.trials) <= 8
    if search.chosen is None:
        assert not kept
    else:
        assert search.chosen in search.trials
        assert (search.chosen.nbytes, search.chosen.drop) == min((t.nbytes, t.drop) for t in kept)


def test_every_trial_may_lose_too_much() -> None:
    search = searched(lambda ratio: 30 - 20 * ratio)
    assert search.chosen is None
    assert [trial.budget for trial in search.trials] == [0.5, 0.75, 0.875, 0.937, 0.968, 0.984]
    assert search.nearest is search.trials[-1]


def test_accepts_every_trial() -> None:
    search = searched(lambda ratio: -0.5, max_drop=0.0)
    assert [trial.budget for trial in search.trials] == [0.5, 0.25, 0.125, 0.062, 0.031, 0.015, 0.007, 0.003]
    assert search.chosen is search.trials[-1]


def test_prefers_the_smaller_loss_at_equal_size() -> None:
    search = searched(lambda ratio: 0.8 if ratio == 0.25 else 0.2 + ratio, nbytes=lambda ratio: 1000)
    assert search.chosen is not None
    assert search.chosen.drop == min(trial.drop for trial in search.trials)


def test_accepts_the_exact_limit_and_rejects_nan() -> None:
    search = searched(lambda ratio: 1.0 if ratio >= 0.75 else math.nan)
    assert search.chosen is not None and search.chosen.budget == 0.75
    nothing = searched(lambda ratio: math.nan)
    assert (nothing.chosen, nothing.nearest) == (None, None)


def test_tries_nothing_where_nothing_shrinks() -> None:
    assert Bisection(1.0, least=1.0).next_budget() is None
    assert Bisection(1.0, least=0.9995).next_budget() is None
    assert Bisection(1.0, least=0.998).next_budget() == 0.999


@SOME
@given(st.floats(0.02, 0.9), st.floats(0.001, 0.2))
def test_finds_a_size(threshold: float, least: float) -> None:
    search = Bisection(1.0, least, goal="size")
    while (budget := search.next_budget()) is not None:
        search.trials.append(Trial(budget, int(1e6 * budget), 0.5 if budget >= threshold else 7, {}))
    best = max(threshold, least)
    assert search.chosen is not None and all(least < trial.budget < 1 for trial in search.trials)
    assert best <= search.chosen.budget <= 1.06 * best + 0.002


def test_tries_no_size_that_the_dense_network_meets() -> None:
    search = Bisection(1.0, 0.1, 0.4, "size")
    assert search.next_budget() == 0.2
