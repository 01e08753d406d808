"""The metric against sums over samples, and where moments are singular."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpoc.tensor_networks.fit.metric import Metric, make_metric, semidefinite
from mpoc.tensor_networks.fit.second_moment import CentredRows, MixedMoment, RowMoment, ShiftedMoment
from tests.tensor_networks.fit.metrics import diagonal_metric, moments, random_metric, row_moments


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    return draw(count, size, seed=seed) @ draw(size, size, seed=seed + 1) + 3 * draw(size, seed=seed + 2)


def squared_error(weight: Tensor, fitted: Tensor, dense: Tensor, seen: Tensor, probes: Tensor) -> Tensor:
    """Mean over rows and probes of (probeᵀ (W x − Ŵ x̃))², by loops over both."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(dense, seen, strict=True):
        error = weight @ x - fitted @ y
        total += sum(((probe @ error) ** 2 for probe in probes), total.new_zeros(()))
    return total / len(dense) / len(probes)


@pytest.mark.parametrize("weighted", [False, True])
def test_objective_is_the_mean_squared_output_error(weighted: bool) -> None:
    samples, weight, fitted = correlated(20, 5), draw(4, 5, seed=8), draw(4, 5, seed=9)
    probes = draw(6, 4, seed=7) if weighted else 2 * torch.eye(4, dtype=torch.float64)
    outputs = probes.T @ probes / 6 if weighted else None
    metric = make_metric(weight, **moments(samples), centred=False, gamma=0, ridge=0, outputs=outputs)
    expected = squared_error(weight, fitted, samples, samples, probes)
    assert metric.value(fitted) == pytest.approx(float(expected), rel=1e-12)
    assert metric.value(weight) == 0.0


def test_centred_objective_uses_the_best_bias() -> None:
    samples, weight, fitted = correlated(20, 5), draw(4, 5, seed=8), draw(4, 5, seed=9)
    metric = make_metric(weight, **moments(samples), centred=True, gamma=0, ridge=0, outputs=None)
    errors = samples @ (weight - fitted).T
    assert metric.value(fitted) == pytest.approx(
        float((errors - errors.mean(0)).square().sum()) / 20, rel=1e-10
    )


@pytest.mark.parametrize("centred", [False, True])
def test_target_is_the_least_squares_weight(centred: bool) -> None:
    dense = correlated(30, 5)
    seen = dense + 0.3 * draw(30, 5, seed=5)
    weight = draw(4, 5, seed=6)
    metric = make_metric(weight, **moments(seen, dense), centred=centred, gamma=0, ridge=0, outputs=None)
    rows = torch.cat([seen, torch.ones(30, 1, dtype=torch.float64)], 1) if centred else seen
    best = torch.linalg.lstsq(rows, dense @ weight.T).solution[:5].T
    torch.testing.assert_close(metric.target, best, rtol=1e-9, atol=1e-9)


def test_regularisation_matches_the_formula() -> None:
    dense = correlated(30, 4)
    seen = dense + 0.3 * draw(30, 4, seed=5)
    weight = draw(3, 4, seed=6)
    metric = make_metric(weight, **moments(seen, dense), centred=False, gamma=0.3, ridge=0.02, outputs=None)
    moment, cross = seen.T @ seen / 30, dense.T @ seen / 30
    regular = 0.7 * moment + 0.3 * moment.diag().diag() + 0.02 * moment.trace() / 4 * torch.eye(4).double()
    torch.testing.assert_close(metric.inputs, regular, rtol=1e-12, atol=1e-12)
    target = weight @ (cross + regular - moment) @ torch.linalg.inv(regular)
    torch.testing.assert_close(metric.target, target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_equal_inputs_keep_the_weight_as_target(count: int, centred: bool, ridge: float) -> None:
    samples, weight = correlated(count, 5), draw(4, 5, seed=6)
    metric = make_metric(weight, **moments(samples), centred=centred, gamma=0.1, ridge=ridge, outputs=None)
    assert torch.equal(metric.target, weight)


def test_few_samples_change_the_target_within_their_span() -> None:
    dense = correlated(2, 6)
    seen = dense + draw(2, 6, seed=5)
    weight = draw(4, 6, seed=6)
    metric = make_metric(weight, **moments(seen, dense), centred=False, gamma=0, ridge=0, outputs=None)
    torch.testing.assert_close(seen @ metric.target.T, dense @ weight.T, rtol=1e-8, atol=1e-8)
    unseen = torch.linalg.svd(seen)[2][2:]
    torch.testing.assert_close(unseen @ metric.target.T, unseen @ weight.T, rtol=1e-8, atol=1e-8)


def test_one_sample_is_fitted_by_the_bias() -> None:
    metric = make_metric(
        draw(4, 5), **moments(correlated(1, 5)), centred=True, gamma=0.1, ridge=1e-3, outputs=None
    )
    assert not metric.inputs.any()
    assert metric.value(draw(4, 5, seed=1)) == 0.0


def test_constant_and_dead_features_are_free() -> None:
    samples = correlated(50, 5)
    samples[:, 1], samples[:, 3] = 1234.567, 0.0
    weight = draw(4, 5, seed=6)
    metric = make_metric(weight, **moments(samples), centred=True, gamma=0.1, ridge=0, outputs=None)
    changed = weight.clone()
    changed[:, [1, 3]] += 100
    assert metric.value(changed) == 0.0
    assert metric.value(2 * weight) > 0


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_roots_square_to_the_moments(rank: int) -> None:
    metric = random_metric(6, 5, ranks=(rank, rank))
    output_root = metric.output_root
    assert output_root is not None and metric.outputs is not None
    torch.testing.assert_close(metric.input_root @ metric.input_root.T, metric.inputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(output_root @ output_root.T, metric.outputs, rtol=0, atol=1e-12)
    assert Metric(metric.target, metric.inputs).output_root is None


def test_semidefinite_clips_negative_rounding() -> None:
    basis = torch.linalg.qr(draw(4, 4))[0]
    clipped = semidefinite((basis * torch.tensor([2.0, 1.0, 0.5, -1e-7])) @ basis.T)
    torch.testing.assert_close(
        clipped, (basis * torch.tensor([2.0, 1.0, 0.5, 0.0])) @ basis.T, rtol=0, atol=1e-14
    )
    assert float(torch.linalg.eigvalsh(clipped)[0]) > -1e-15


def test_diagonal_metric_is_not_formed() -> None:
    metric, formed = diagonal_metric(7, 5)
    matrix = draw(7, 5, seed=4)
    assert metric.value(matrix) == pytest.approx(formed.value(matrix), rel=1e-12)
    assert metric.output_root is not None and formed.output_root is not None
    torch.testing.assert_close(metric.output_root.diag(), formed.output_root)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_rows_are_the_metric_of_their_moment(centred: bool, gamma: float) -> None:
    dense = correlated(300, 340)[:, :40] if gamma else correlated(30, 40)
    seen, weight = dense + 0.3 * draw(*dense.shape, seed=5), draw(4, 40, seed=6)
    options: dict[str, Any] = {"centred": centred, "gamma": gamma, "ridge": 1e-4, "outputs": None}
    wanted = make_metric(weight, **moments(seen, dense), **options)
    found = make_metric(weight, **row_moments(seen, dense), **options)
    torch.testing.assert_close(found.target, wanted.target, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.inputs.formed(), wanted.inputs, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(found.inputs.diagonal(), wanted.inputs.diagonal(), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(found.weighed(weight), wanted.weighed(weight), rtol=1e-8, atol=1e-7)
    without = make_metric(weight, **row_moments(seen), **options)
    assert without.target is weight


@pytest.mark.parametrize("constant", [False, True])
def test_shifted_moment_is_that_of_shifted_rows(constant: bool) -> None:
    x, y, matrix = correlated(30, 5), correlated(30, 5, seed=3), draw(4, 5, seed=6)
    varies = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64) if constant else None
    a, b = draw(5, seed=7), draw(5, seed=8)
    shifted = ShiftedMoment.about(x.T @ y / 30, x.mean(0), y.mean(0), a, b)
    shifted = ShiftedMoment(shifted.second, shifted.columns, shifted.rows, varies)
    wanted = (x - a).T @ (y - b) / 30
    wanted = wanted if varies is None else wanted * varies[:, None] * varies
    torch.testing.assert_close(matrix @ shifted, matrix @ wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted.diagonal(), wanted.diagonal(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted.scaled(0.7), 0.7 * wanted, rtol=1e-12, atol=1e-12)


def test_mixed_moment_is_formed_only_where_it_stands_alone() -> None:
    x, y, weight = correlated(30, 5), correlated(3, 5, seed=3), draw(4, 5, seed=6)
    rows = CentredRows(y, torch.zeros(5, dtype=torch.float64))
    of_rows = RowMoment(rows, rows, torch.full((3,), 1 / 3, dtype=torch.float64))
    mixed = MixedMoment(x.T @ x / 30, of_rows, 0.2)
    wanted = 0.8 * (x.T @ x / 30) + 0.2 * (y.T @ y / 3)
    torch.testing.assert_close(weight @ mixed, weight @ wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed.diagonal(), wanted.diagonal(), rtol=1e-12, atol=1e-12)
    mean = draw(5, seed=7)
    for centred in (False, True):
        options: dict[str, Any] = {"centred": centred, "gamma": 0.1, "ridge": 1e-4, "outputs": None}
        found = make_metric(weight, mixed, mean, mixed, mean, **options)
        formed = make_metric(weight, wanted, mean, wanted, mean, **options)
        torch.testing.assert_close(found.inputs, formed.inputs, rtol=1e-12, atol=1e-12)
        assert found.target is weight


def test_moment_of_rows_far_from_zero_is_exact() -> None:
    values = (correlated(9, 12) + 1000).float()
    centred = CentredRows(values, values.double().mean(0))
    weights = torch.full((9,), 1 / 9, dtype=torch.float64)
    wanted = values.double().T.cov(correction=0)
    torch.testing.assert_close(RowMoment(centred, centred, weights).formed(), wanted, rtol=1e-4, atol=1e-4)


def test_difference_and_transpose_of_row_moments() -> None:
    seen, dense, weight = correlated(9, 12), correlated(9, 12, seed=3), draw(3, 12, seed=6)
    rows, exact = row_moments(seen, dense), moments(seen, dense)
    rest = weight @ (rows["cross"] - rows["second"])
    torch.testing.assert_close(rest, weight @ (exact["cross"] - exact["second"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight @ rows["cross"].T, weight @ exact["cross"].T, rtol=1e-9, atol=1e-9)
