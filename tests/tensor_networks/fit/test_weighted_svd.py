"""The closed form against the theorem of Eckart and Young, and against gradient descent."""

from typing import Any

import pytest
import torch

from mpoc.tensor_networks.fit.metric import Metric, make_metric
from mpoc.tensor_networks.fit.whitening import BesideLowRank, weighted_svd
from tests.tensor_networks.fit.metrics import diagonal_metric, moments, random_metric, row_moments

METRICS = {
    "no G": random_metric(9, 7, weighted_outputs=False),
    "wide": random_metric(6, 11),
    "tall": random_metric(11, 6),
    "M singular": random_metric(9, 7, ranks=(4, None)),
    "M singular, no G": random_metric(9, 7, weighted_outputs=False, ranks=(4, None)),
    "G singular": random_metric(9, 7, ranks=(None, 5)),
    "one sample": random_metric(9, 7, ranks=(1, 9)),
}


def symmetric_root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_every_rank_is_optimal_in_the_whitened_problem(metric: Metric) -> None:
    """Eckart-Young: no weight of rank r has less than the tail of the whitened target's singular values."""
    whitened = metric.target @ symmetric_root(metric.inputs)
    if metric.outputs is not None:
        whitened = symmetric_root(metric.outputs) @ whitened
    values = torch.linalg.svdvals(whitened)
    found = weighted_svd(metric)
    largest = float(values[0]) ** 2
    for rank in range(len(found.values) + 1):
        optimum = float(values[rank:].square().sum())
        value = metric.value(found.left[:, :rank] @ found.right[:rank])
        assert value == pytest.approx(optimum, rel=1e-9, abs=1e-13 * largest)
        assert float(found.values[rank:].square().sum()) == pytest.approx(
            optimum, rel=1e-9, abs=1e-13 * largest
        )


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_gradient_beside_a_low_rank_weight_is_that_at_the_best_one(metric: Metric) -> None:
    best = weighted_svd(metric)
    rest = metric.target - best.left[:, :2] @ best.right[:2]
    value, gradient = BesideLowRank(metric, 2).weighed_error(metric.target)
    largest = float(metric.weighed(metric.target).abs().max())
    assert value == pytest.approx(metric.value(metric.target - rest), rel=1e-9)
    torch.testing.assert_close(gradient, metric.weighed(rest), rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.parametrize("name", ["no G", "wide", "tall"])
def test_full_rank_is_the_target(name: str) -> None:
    metric = METRICS[name]
    found = weighted_svd(metric)
    torch.testing.assert_close(found.left @ found.right, metric.target, rtol=1e-10, atol=1e-10)


def test_gradient_descent_cannot_improve() -> None:
    metric = random_metric(6, 5, seed=3)
    outputs = metric.outputs
    assert outputs is not None
    found = weighted_svd(metric)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 2), (2, 5)))
    left, right = left.requires_grad_(), right.requires_grad_()
    optimiser = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        error = metric.target - left @ right
        value = torch.trace(outputs @ error @ metric.inputs @ error.T)
        value.backward()
        return value

    optimiser.step(loss)
    reached = metric.value((left @ right).detach())
    optimum = metric.value(found.left[:, :2] @ found.right[:2])
    assert optimum <= reached <= optimum * 1.01


def test_missing_output_metric_is_the_identity() -> None:
    metric = METRICS["no G"]
    other = weighted_svd(Metric(metric.target, metric.inputs, torch.eye(9, dtype=torch.float64)))
    found = weighted_svd(metric)
    torch.testing.assert_close(found.values, other.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found.left[:, :3] @ found.right[:3], other.left[:, :3] @ other.right[:3], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["no G", "wide", "G singular"])
def test_factors_are_balanced(name: str) -> None:
    found = weighted_svd(METRICS[name])
    left, right = found.factors(3)
    torch.testing.assert_close(left @ right, found.left[:, :3] @ found.right[:3], rtol=1e-10, atol=1e-10)
    gram = left.T @ left
    torch.testing.assert_close(gram, right @ right.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-10, atol=1e-10)


def test_free_directions_follow_the_target() -> None:
    """With the rank for all that is seen, the weight is right on unseen inputs as far as it can be."""
    metric = random_metric(4, 7, weighted_outputs=False, ranks=(5, None))
    found = weighted_svd(metric)
    torch.testing.assert_close(found.left @ found.right, metric.target, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("which", ["target", "inputs", "outputs"])
def test_zeros_give_finite_factors(which: str) -> None:
    parts = {"target": torch.ones(3, 4), "inputs": torch.eye(4), "outputs": torch.eye(3)}
    parts[which] = torch.zeros_like(parts[which])
    metric = Metric(**{name: part.double() for name, part in parts.items()})
    found = weighted_svd(metric)
    assert found.values.tolist() == [0.0]
    product = found.left @ found.right
    assert product.isfinite().all() and metric.value(product) == 0.0
    assert all(factor.isfinite().all() for factor in found.factors(1))


def test_diagonal_metric_is_not_formed() -> None:
    found, expected = map(weighted_svd, diagonal_metric(11, 6))
    torch.testing.assert_close(found.values, expected.values)
    for rank in (1, 3, 6):
        torch.testing.assert_close(
            found.left[:, :rank] @ found.right[:rank], expected.left[:, :rank] @ expected.right[:rank]
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [5, 30])
def test_rows_give_the_same_weights(outputs: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(15, 20, generator=generator, dtype=torch.float64).cumsum(1)
    plain = random_metric(outputs, 20, weighted)
    options: dict[str, Any] = {"centred": True, "gamma": 0.02, "ridge": 1e-6, "outputs": plain.outputs}
    found, wanted = (
        weighted_svd(make_metric(plain.target, **known(samples), **options))
        for known in (row_moments, moments)
    )
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-6, atol=1e-8)
    for rank in (1, 3, 5):
        best = [one.left[:, :rank] @ one.right[:rank] for one in (found, wanted)]
        torch.testing.assert_close(best[0], best[1], rtol=1e-5, atol=1e-5)
