"""White coordinates change no f, and make the metric the identity where it is a product over sites."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoc.tensor_networks.fit.metric import Metric, make_metric
from mpoc.tensor_networks.fit.whitening import (
    WhitenedCoordinates,
    diagonal_factors,
    kronecker_factors,
    whitened_coordinates,
)
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import low_rank_structure, make_structure
from tests.support.weights import random_cores
from tests.tensor_networks.fit.metrics import (
    diagonal_metric,
    moments,
    random_metric,
    random_moment,
    row_moments,
)


def kron(*factors: Tensor) -> Tensor:
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


def test_recovers_the_factors_of_a_product() -> None:
    parts = [random_moment(size, seed=size) for size in (3, 1, 4, 2)]
    for found, part in zip(kronecker_factors(kron(*parts), (3, 1, 4, 2)), parts, strict=True):
        expected = part / part.trace() * len(part)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_whitens_a_product_to_the_identity() -> None:
    inputs = kron(random_moment(3, seed=1), random_moment(4, seed=2))
    outputs = kron(random_moment(2, seed=3), random_moment(5, seed=4))
    metric = Metric(torch.ones(10, 12, dtype=torch.float64), inputs, outputs)
    white = whitened_coordinates(metric, (2, 5), (3, 4)).whiten(metric)
    assert white.outputs is not None
    for moment, size in ((white.inputs, 12), (white.outputs, 10)):
        identity = torch.eye(size, dtype=torch.float64) * moment.trace() / size
        torch.testing.assert_close(moment, identity, rtol=0, atol=0.02 * float(moment.trace()) / size)


def test_whitens_every_site_on_average() -> None:
    """With the other sites averaged over, what is left at a site is the identity."""
    metric = random_metric(6, 24)
    white = whitened_coordinates(metric, (1, 2, 3), (2, 3, 4)).whiten(metric).inputs.reshape(2, 3, 4, 2, 3, 4)
    for k, pattern in enumerate(("abcdbc->ad", "abcadc->bd", "abcabd->cd")):
        mean = torch.einsum(pattern, white)
        mean = mean / mean.trace() * len(mean)
        tolerance = 0.05 if k < 2 else 1e-3  # the last was the last to be updated
        torch.testing.assert_close(mean, torch.eye(len(mean)).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("ranks", [(None, None), (3, 2), (1, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_preserves_the_objective(weighted: bool, ranks: tuple[int | None, int | None]) -> None:
    factors = (2, 3, 2), (1, 4, 3)
    structure = make_structure("linear", (12, 12), factors=factors)
    metric = random_metric(12, 12, weighted, ranks)
    coordinates = whitened_coordinates(metric, *factors)
    two = low_rank_structure("linear", (12, 12))
    others = (replace(structure, form=form_name) for form_name in ("tree", "mera"))
    for form in (form_of(random_cores(one, 3), one) for one in (structure, two, *others)):
        same_number(form, metric, coordinates)


def same_number(form: Form, metric: Metric, coordinates: WhitenedCoordinates) -> None:
    white = coordinates.whiten_form(form)
    value = coordinates.whiten(metric).value(white.to_matrix()[0])
    assert value == pytest.approx(metric.value(form.to_matrix()[0]), rel=1e-9)
    back = coordinates.restore_form(white)
    torch.testing.assert_close(back.to_matrix(), form.to_matrix(), rtol=1e-9, atol=1e-9)


def test_zero_moments_keep_the_coordinates() -> None:
    for factor in kronecker_factors(torch.zeros(6, 6, dtype=torch.float64), (2, 3)):
        assert torch.equal(factor, torch.eye(len(factor), dtype=torch.float64))


def test_absent_features_keep_coordinates_finite() -> None:
    moment = random_moment(6)
    moment[:3] = moment[:, :3] = 0.0
    for factor in kronecker_factors(moment, (2, 3)):
        values = torch.linalg.eigvalsh(factor)
        assert math.isclose(float(values.mean()), 1.0, rel_tol=1e-3)
        assert float(values[0]) > 0.9e-6


def test_diagonal_moments_are_not_formed() -> None:
    factors = (2, 3, 2), (1, 4, 3)
    metric, formed = diagonal_metric(12, 12)
    assert metric.outputs is not None
    pairs = zip(
        diagonal_factors(metric.outputs, factors[0]),
        kronecker_factors(metric.outputs.diag(), factors[0]),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found.diag(), expected)
    coordinates = whitened_coordinates(metric, *factors)
    white, whole = coordinates.whiten(metric), whitened_coordinates(formed, *factors).whiten(formed)
    assert white.outputs is not None
    torch.testing.assert_close(white.target, whole.target)
    torch.testing.assert_close(white.outputs.diag(), whole.outputs)
    for structure in (
        make_structure("linear", (12, 12), factors=factors),
        low_rank_structure("linear", (12, 12)),
    ):
        same_number(MPO(random_cores(structure, 3), structure), metric, coordinates)


def test_zero_diagonal_keeps_the_coordinates() -> None:
    for factor in diagonal_factors(torch.zeros(6, dtype=torch.float64), (2, 3)):
        assert torch.equal(factor, torch.ones_like(factor))


def test_rows_have_the_factors_of_their_moment() -> None:
    samples = torch.randn(9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    options: dict[str, Any] = {"centred": True, "gamma": 0.1, "ridge": 1e-3, "outputs": None}
    weight = torch.ones(2, 24, dtype=torch.float64)
    rows, formed = (make_metric(weight, **known(samples), **options) for known in (row_moments, moments))
    pairs = zip(
        kronecker_factors(rows.inputs, (2, 3, 4)), kronecker_factors(formed.inputs, (2, 3, 4)), strict=True
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    white = [whitened_coordinates(one, (2,), (2, 3, 4)).whiten(one) for one in (rows, formed)]
    torch.testing.assert_close(white[0].weighed(weight), white[1].weighed(weight), rtol=1e-8, atol=1e-8)
