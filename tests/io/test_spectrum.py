"""A few points of a spectrum, and what cannot be one."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.io.manifest import MOST_POINTS, Spectrum, longest, thinned
from mpoc.io.manifest_reader import check_spectrum

SOME = settings(max_examples=60, deadline=None, derandomize=True)


def test_keeps_short_spectra_whole() -> None:
    assert thinned([4.0, 3.0, 0.0], 2) == ((1, 0.8), (2, 0.6), (3, 0.0))


def test_zeros_have_no_spectrum() -> None:
    assert thinned([0.0, 0.0], 1) == ()


@pytest.mark.slow
@SOME
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.1, 3))
def test_keeps_first_cut_and_last_values(count: int, share: float, power: float) -> None:
    kept = max(1, round(share * count))
    values = [7 * k**-power for k in range(1, count + 1)]
    points = thinned(values, kept)
    indices = [index for index, _ in points]
    assert {1, kept, count} <= set(indices)
    assert len(points) <= MOST_POINTS
    norm = math.sqrt(sum(value**2 for value in values))
    for index, value in points:
        assert value == pytest.approx(values[index - 1] / norm, rel=1e-5)
    check_spectrum(points, count)
    most = longest(count, 1.23456e-104)
    assert len(points) <= len(most) <= MOST_POINTS
    assert len(str(points)) <= len(str(most))


def test_samples_indices_logarithmically() -> None:
    indices = [index for index, _ in thinned([1.0] * 4096, 1)]
    ratios = [after / before for before, after in itertools.pairwise(indices) if before > 30]
    assert max(ratios) / min(ratios) < 1.1


@pytest.mark.parametrize(
    "spectrum",
    [
        (),
        ((2, 1.0),),
        ((1, 0.5), (1, 0.5)),
        ((1, 0.5), (3, 0.6)),
        ((1, 1.5),),
        ((1, 0.5), (2, -0.1)),
        ((1, 0.5), (2, float("nan"))),
        ((1, float("nan")),),
        ((1, 0.5), (9, 0.1)),
        tuple((k, 0.1) for k in range(1, 40)),
    ],
)
def test_rejects_malformed_spectra(spectrum: Spectrum) -> None:
    with pytest.raises(ValueError, match="a spectrum of"):
        check_spectrum(spectrum, 8)
