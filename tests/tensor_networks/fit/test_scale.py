"""Weights of any size: the same fit, and the error that is true."""

import math

import pytest
import torch

from mpoc.tensor_networks.fit.truncation import Truncation, exponent_of, largest, scaled, spread
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure

STRUCTURES = [make_structure("linear", (64, 48)), low_rank_structure("linear", (64, 48))]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.form)
@pytest.mark.parametrize("exponent", [-125, -100, -50, 50, 100, 122])
def test_power_of_two_changes_only_the_scale(structure: Structure, exponent: int) -> None:
    weight = torch.randn(64, 48)
    scales = (1.0, 2.0**exponent)
    plain, other = (tt_svd(weight * scale, structure, Truncation(8)) for scale in scales)
    assert other.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert other.entropies == pytest.approx(plain.entropies, rel=1e-4)
    back = other.form.to_weight().double() * 2.0**-exponent
    assert torch.allclose(back, plain.form.to_weight().double(), atol=1e-4)


@pytest.mark.parametrize("size", [1e-41, 1e-38, 1e-20, 1e20, 5e37])
def test_error_matches_the_restored_weight(size: float) -> None:
    weight = torch.randn(64, 48) * size
    fit = tt_svd(weight, STRUCTURES[0], Truncation(8))
    lost = (fit.form.to_weight().double() - weight.double()).norm() / weight.double().norm()
    assert fit.relative_error == pytest.approx(float(lost), rel=1e-4)
    assert 0.7 < fit.relative_error < 0.8  # as a random matrix of any size


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e200, 1e307])
def test_scales_float64(size: float) -> None:
    weight = torch.randn(64, 48, dtype=torch.float64)
    fit, plain = (tt_svd(weight * scale, STRUCTURES[0], Truncation(8)) for scale in (size, 1.0))
    assert fit.relative_error == pytest.approx(plain.relative_error, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (7, 1)])
@pytest.mark.parametrize("value", [0.0, 1e-40, 3e38])
def test_restores_thin_and_constant_weights(shape: tuple[int, int], value: float) -> None:
    weight = torch.full(shape, value)
    for structure in (make_structure("linear", shape), low_rank_structure("linear", shape)):
        fit = tt_svd(weight, structure, Truncation(4))
        assert torch.allclose(fit.form.to_weight(), weight, rtol=1e-5, atol=2e-45)
        assert fit.relative_error < 1e-5 and all(math.isfinite(found) for found in fit.entropies)


def test_restores_rank_deficient_weights() -> None:
    weight = torch.outer(torch.randn(64), torch.randn(48)) * 1e-30
    fit = tt_svd(weight, STRUCTURES[1], Truncation(8))
    assert fit.relative_error < 1e-5
    assert fit.form.bonds == (1, 1, 1)


def test_ordinary_weights_are_not_scaled() -> None:
    for size in (0.0, 1e-11, 1.0, 1e11):
        weight = torch.full((3, 2), size)
        assert exponent_of(weight) == 0
        assert scaled(weight, 0) is weight
    assert exponent_of(torch.empty(0)) == exponent_of(torch.tensor([math.inf, 1.0])) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -7.0])
def test_detects_an_outlier_anywhere(dtype: torch.dtype, odd: float) -> None:
    for place in (0, 77, 5999):
        weight = torch.linspace(-1, 1, 6000).to(dtype)
        weight[place] = odd
        assert largest(weight.view(60, 100).T) == pytest.approx(abs(odd), nan_ok=True)
    assert largest(torch.empty(0, 3, dtype=dtype)) == 0.0


def test_distributes_the_exponent_exactly() -> None:
    structure = STRUCTURES[0]
    form = tt_svd(torch.randn(64, 48), structure, Truncation(8)).form
    grown = MPO(spread(form.cores, 7), structure)
    assert torch.equal(grown.to_weight(), 128 * form.to_weight())
