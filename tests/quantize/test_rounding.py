"""Rounding with feedback: against textbook GPTQ and brute force, in f, in bytes, and on bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mpoc.errors import MpocError, UsageError
from mpoc.quantize import grid_rounding, rounding
from mpoc.quantize.codes import CodedTensor, GridTensor, QuantizedTensor
from mpoc.quantize.feedback import Feedback, best_exponents, typical_error, weights_of
from mpoc.quantize.grid_rounding import round_grid
from mpoc.quantize.rounding import coded_in_bytes, round_coded
from mpoc.quantize.storage import GRID_BITS, Grid


def cost(target: Tensor, values: Tensor, metric: Tensor | None, row_metric: Tensor | None = None) -> float:
    """f = tr(G (T − V) H (T − V)ᵀ); None is the identity, and a vector G its diagonal."""
    error = (target - values).double()
    right = error if metric is None else error @ metric.double()
    if row_metric is not None:
        right = row_metric[:, None] * right if row_metric.ndim == 1 else row_metric.double() @ right
    return float((error * right).sum())


def price(steps: Tensor, feedback: Feedback | None, row_weights: Tensor | None = None) -> float:
    """Predict f of rounding with these steps: Σ_k U_kk² Σ_i G_ii δ_ik² / 12.

    Args:
        steps: δ, (rows, columns) or a shape that broadcasts with the weights.
        feedback: the metric of the columns; None is the identity.
        row_weights: diagonal of G, (rows,); None is ones.
    """
    squares = steps.cpu().double().square()
    if feedback is not None:
        squares = squares * feedback.weights.double()
    if row_weights is not None:
        squares = squares * row_weights.cpu().double()[:, None]
    return float(squares.sum()) / 12


def correlated(size: int, seed: int = 0) -> Tensor:
    """A damped metric with eigenvalues over several orders, (size, size)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    inputs = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -2, size) @ mix
    metric = inputs.T @ inputs / len(inputs)
    return metric + 0.01 * torch.diag(metric.diagonal())


def weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def column_exponents(feedback: Feedback | None, columns: int) -> Tensor:
    return best_exponents(None if feedback is None else feedback.weights, columns)


def coded(target: Tensor, feedback: Feedback | None, scale: float) -> CodedTensor:
    exponents = (
        best_exponents(None, len(target)),
        column_exponents(feedback, target.shape[1]),
    )
    return round_coded(target, feedback, *exponents, scale)


def gptq(target: Tensor, metric: Tensor, step: float) -> Tensor:
    """The published loop: the inverse's Cholesky factor, one column at a time.  float64."""
    order = metric.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(metric.double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, values = target.double()[:, order].clone(), torch.zeros_like(target, dtype=torch.float64)
    for k in range(len(metric)):
        values[:, order[k]] = step * (left[:, k] / step).round()
        error = (left[:, k] - values[:, order[k]]) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    return values.float()


def without_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave codes as feedback makes them; the refitted scale stays."""
    monkeypatch.setattr(grid_rounding, "_SWEEPS", 0)


@pytest.mark.parametrize("columns", [24, 150])
def test_codes_are_those_of_textbook_gptq(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    without_sweeps(monkeypatch)
    target, metric = weight(20, columns), correlated(columns)
    zeros = torch.zeros(20, dtype=torch.int8), torch.zeros(columns, dtype=torch.int8)
    found = round_coded(target, Feedback(metric), *zeros, 0.03)
    expected = (gptq(target, metric, 0.03) / 0.03).round()
    # A number that lies between two codes may go either way, in float32 and in float64.
    assert (found.codes != expected).float().mean() < 0.002


def of_unit_diagonal(metric: Tensor) -> Tensor:
    """Rounded in the given order, and well conditioned."""
    sizes = metric.diagonal().sqrt()
    return (0.7 * metric / sizes / sizes[:, None]).fill_diagonal_(1.0)


@pytest.mark.parametrize("sizes", [(35, 40), (3, 70)])
def test_codes_of_two_sides_are_those_of_gptq_on_all_numbers(sizes: tuple[int, int]) -> None:
    """Against one row of all numbers, whose metric is G ⊗ H."""
    rows, columns = (of_unit_diagonal(correlated(size, seed)) for seed, size in enumerate(sizes))
    target, (of_rows, of_columns) = weight(*sizes), (torch.zeros(size, dtype=torch.int8) for size in sizes)
    found = round_coded(target, Feedback(columns), of_rows, of_columns, 0.03, Feedback(rows))
    expected = (gptq(target.reshape(1, -1), torch.kron(rows, columns), 0.03) / 0.03).round()
    assert (found.codes.reshape(1, -1) != expected).float().mean() < 0.002


def test_feedback_between_rows_alone_is_that_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix of the size of all columns is made, which may be too many for one."""
    monkeypatch.delattr(rounding, "round_two_sided")
    target, rows = weight(40, 70), Feedback(correlated(40))
    of_rows, of_columns = (torch.zeros(size, dtype=torch.int8) for size in (40, 70))
    found = round_coded(target, None, of_rows, of_columns, 0.03, rows)
    turned = round_coded(target.T.contiguous(), rows, of_columns, of_rows, 0.03)
    assert torch.equal(found.codes, turned.codes.T) and found.scale == pytest.approx(turned.scale)


@pytest.mark.parametrize("storage", [None, Grid(3, 32)])
def test_feedback_between_rows_lowers_f(storage: Grid | None) -> None:
    target, metric, outputs = weight(96, 64), correlated(64), correlated(96, 3)
    feedback, rows = Feedback(metric), Feedback(outputs)

    def f(given: Feedback | Tensor) -> float:
        if storage is not None:
            values = round_grid(target, feedback, storage, given).values()
        else:
            exponents = best_exponents(weights_of(given), 96), best_exponents(feedback.weights, 64)
            values = coded_in_bytes(target, feedback, *exponents, 2500, given).values()
        error = (target - values).double()
        return float(((outputs.double() @ error @ metric.double()) * error).sum())

    assert f(rows) < 0.8 * f(outputs.diagonal())


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_published_one(bits: int) -> None:
    """Against elimination: errors go to the columns left in proportion to the inverse of their metric."""
    target, metric = weight(6, 40), correlated(40)
    metric[:, 7] = metric[7] = 0.0  # an input that never occurs
    left, rest = target.double(), metric.double() + 0.01 * metric.diagonal().mean() * torch.eye(40)
    expected = torch.zeros(6, 40, dtype=torch.float64)
    left[:, 7] = 0.0
    for k in range(40):
        if k % 16 == 0:  # the range of a group is that of what is left of it
            low, high = (f(left[:, k : k + 16], 1).values for f in (torch.min, torch.max))
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).half().double()
            zero = (-low / scale).round()
        expected[:, k] = (((left[:, k] / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
        inverse = torch.linalg.inv(rest[k:, k:])
        left[:, k:] -= torch.outer((left[:, k] - expected[:, k]) / inverse[0, 0], inverse[0])
    found = grid_rounding.gptq(target, metric, bits, 16)
    assert (found - expected).abs().gt(1e-4).double().mean() < 0.02  # a tie may go either way
    nearest = grid_rounding.gptq(target, None, bits, 16)
    assert cost(target, found, metric) < 0.8 * cost(target, nearest, metric)


def test_factor_gives_the_metric() -> None:
    metric = correlated(60)
    feedback = Feedback(metric)
    pivots = feedback.weights[feedback.order].sqrt()
    upper = (feedback.shares + torch.eye(60)) * pivots
    ordered = metric[feedback.order][:, feedback.order]
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ upper.T, ordered, rtol=1e-4, atol=1e-5)
    assert bool((ordered.diagonal().diff() <= 0).all())


@pytest.mark.parametrize("spec", [None, Grid(2), Grid(2, 2, symmetric=True)])
def test_tiny_codes_are_near_the_best_of_all(spec: Grid | None) -> None:
    """Against every code within two of the found ones, at the found scales."""
    metric = correlated(4)
    target = weight(12, 4)
    feedback = Feedback(metric)
    found: QuantizedTensor = (
        coded(target, feedback, 0.05) if spec is None else round_grid(target, feedback, spec)
    )
    steps, values = found.steps(), found.values()
    best = 0.0
    for i in range(12):
        moves = torch.tensor(list(itertools.product(range(-2, 3), repeat=4)), dtype=torch.float32)
        codes = found.codes[i].float() + moves
        allowed = (
            torch.ones(len(codes), dtype=torch.bool) if spec is None else ((codes >= 0) & (codes < 4)).all(1)
        )
        errors = target[i] - values[i] - moves * steps[i]
        best += float(torch.einsum("nj,jk,nk->n", errors, metric, errors)[allowed].min())
    assert best <= cost(target, values, metric) <= 1.3 * best


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_feedback_and_sweeps_lower_f(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool) -> None:
    target, metric, spec = weight(32, 128), correlated(128), Grid(bits, 32, symmetric)
    feedback = Feedback(metric)
    nearest = cost(target, round_grid(target, None, spec).values(), metric)
    swept = cost(target, round_grid(target, feedback, spec).values(), metric)
    without_sweeps(monkeypatch)
    assert swept < cost(target, round_grid(target, feedback, spec).values(), metric) < 0.7 * nearest


@pytest.mark.parametrize("bits", [3.0, 1.0])
def test_a_dead_zone_lowers_f_of_coded_at_equal_bytes(monkeypatch: pytest.MonkeyPatch, bits: float) -> None:
    target, metric = weight(64, 128), correlated(128)
    feedback = Feedback(metric)
    exponents = best_exponents(None, 64), best_exponents(feedback.weights, 128)
    nbytes = int(bits * target.numel() / 8)
    trimmed = coded_in_bytes(target, feedback, *exponents, nbytes)
    monkeypatch.setattr(rounding, "_DEAD_ZONE", 0.0)
    nearest = coded_in_bytes(target, feedback, *exponents, nbytes)
    assert cost(target, trimmed.values(), metric) < cost(target, nearest.values(), metric)


@pytest.mark.parametrize("spec", [Grid(4, 32), Grid(8), Grid(3, 64, symmetric=True)])
def test_nearest_code_without_a_metric(spec: Grid) -> None:
    """At the stored scales no other code is nearer."""
    target = weight(16, 64)
    found = round_grid(target, None, spec)
    zero = (
        found.zero_point.float().repeat_interleave(64 // found.scale.shape[1], 1)
        if found.zero_point is not None
        else spec.levels / 2
    )
    every = (torch.arange(spec.levels)[:, None, None] - zero) * found.steps()
    assert torch.equal((every - target).abs().amin(0), (found.values() - target).abs())


def test_error_of_a_fine_grid_is_below_half_a_step() -> None:
    target = weight(16, 64)
    for spec in (Grid(8, 32), Grid(6, 32)):
        found = round_grid(target, None, spec)
        assert float(((found.values() - target).abs() / found.steps()).mean()) < 0.26


@pytest.mark.parametrize("rows_differ", [False, True])
def test_price_is_f_of_feedback(monkeypatch: pytest.MonkeyPatch, rows_differ: bool) -> None:
    without_sweeps(monkeypatch)
    target, metric = weight(256, 96), correlated(96)
    weights = torch.logspace(0, 2, 256) if rows_differ else None
    feedback = Feedback(metric)
    exponents = best_exponents(weights, 256), best_exponents(feedback.weights, 96)
    found = round_coded(target, feedback, *exponents, 0.003, weights)
    expected = cost(target, found.values(), metric, weights)
    assert price(found.steps(), feedback, weights) == pytest.approx(expected, rel=0.05)


def test_best_exponents() -> None:
    """Steps ∝ 1/U_kk and 1/√G_ii cost less than equal steps at the same bits."""
    assert best_exponents(torch.tensor([1.0, 2.0, 0.25, 0.0, 1e-9]), 5).tolist() == [1, 0, 3, 15, 15]
    assert best_exponents(None, 3).tolist() == best_exponents(torch.zeros(3), 3).tolist() == [0, 0, 0]
    spread = torch.logspace(0, 1.5, 96)
    target, metric = weight(48, 96), correlated(96) * spread[:, None] * spread
    feedback = Feedback(metric)
    rows, flat = best_exponents(None, 48), torch.zeros(96, dtype=torch.int8)
    best, equal = (
        cost(target, coded_in_bytes(target, feedback, rows, columns, 1800).values(), metric)
        for columns in (best_exponents(feedback.weights, 96), flat)
    )
    assert best < 0.9 * equal


@pytest.mark.parametrize(("bits", "outliers"), [(5.0, 1.0), (3.0, 1.0), (1.0, 1.0), (7.9, 30.0)])
@pytest.mark.parametrize("with_metric", [False, True])
def test_stream_fits_the_bytes(bits: float, outliers: float, with_metric: bool) -> None:
    target = weight(96, 128)
    target[:, ::3] *= outliers
    feedback = Feedback(correlated(128)) if with_metric else None
    exponents = best_exponents(None, 96), column_exponents(feedback, 128)
    wanted = int(bits * target.numel() / 8)
    found = coded_in_bytes(target, feedback, *exponents, wanted)
    assert 0.99 * wanted <= found.nbytes <= wanted


def test_steps_of_a_row_leave_room_for_its_codes() -> None:
    target, costs = weight(1, 400), 2.0 ** (-8 * torch.rand(400, generator=torch.Generator().manual_seed(0)))
    found = coded_in_bytes(target, None, best_exponents(None, 1), best_exponents(costs, 400), 77)
    assert 0 < found.values().count_nonzero() < 400
    assert found.nbytes <= 77


@pytest.mark.parametrize("magnitude", [2.0**-110, 2.0**-60, 2.0**100])
def test_any_magnitude_is_coded_alike(magnitude: float) -> None:
    target, exponents = weight(16, 64), (best_exponents(None, 16), best_exponents(None, 64))
    found = coded_in_bytes(magnitude * target, None, *exponents, 400)
    alike = coded_in_bytes(target, None, *exponents, 400)
    assert torch.equal(found.values(), magnitude * alike.values())


def test_too_few_bytes_give_zeros() -> None:
    target = weight(8, 32)
    exponents = best_exponents(None, 8), best_exponents(None, 32)
    found = coded_in_bytes(target, None, *exponents, 10)
    assert found.nbytes < 60
    assert coded_in_bytes(torch.zeros(8, 32), None, *exponents, 100).values().count_nonzero() == 0


def test_dead_columns_are_rounded_to_nearest() -> None:
    target, metric = weight(16, 64), correlated(64)
    dead = [3, 40]
    metric[dead] = 0.0
    metric[:, dead] = 0.0
    feedback = Feedback(metric)
    found = coded(target, feedback, 0.01)
    error = (found.values() - target)[:, dead].abs()
    assert bool((error <= 0.51 * found.steps()[:, dead]).all())
    assert cost(target, found.values(), metric) < cost(target, coded(target, None, 0.01).values(), metric)
    grid = round_grid(target, feedback, Grid(4, 32))
    assert bool((grid.values() - target)[:, dead].isfinite().all())


@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 1e-3, 1e4])
def test_any_magnitude_fits_a_grid(magnitude: float) -> None:
    target = magnitude * weight(4, 32)
    values = round_grid(target, None, Grid(8, 32)).values()
    assert float((values - target).abs().max()) <= max(0.01 * magnitude, 6e-8)


@pytest.mark.parametrize("spec", [None, Grid(3, 32)])
def test_rounding_is_deterministic_and_leaves_its_inputs(spec: Grid | None) -> None:
    target, metric = weight(16, 64), correlated(64)
    before = target.clone(), metric.clone()
    feedback = Feedback(metric)

    def rounded() -> QuantizedTensor:
        return coded(target, feedback, 0.05) if spec is None else round_grid(target, feedback, spec)

    assert torch.equal(rounded().values(), rounded().values())
    assert torch.equal(target, before[0])
    assert torch.equal(metric, before[1])


def test_file_gives_the_rounded_numbers() -> None:
    target = weight(16, 64)
    feedback = Feedback(correlated(64))
    found = coded(target, feedback, 0.02)
    again = CodedTensor.from_tensors(found.tensors("w"), "w", (16, 64))
    assert torch.equal(again.values(), found.values())
    assert again.codes.dtype == found.codes.dtype
    grid = round_grid(target, feedback, Grid(5, 32))
    assert torch.equal(
        GridTensor.from_tensors(grid.tensors("w"), "w", grid.spec, (16, 64)).values(), grid.values()
    )


def test_rejects_bad_input() -> None:
    target = weight(4, 32)
    bad = target.clone()
    bad[0, 0] = np.nan
    with pytest.raises(MpocError, match="not finite"):
        round_grid(bad, None, Grid(4))
    with pytest.raises(MpocError, match="not finite"):
        coded(bad, None, 0.1)
    with pytest.raises(MpocError, match=r"steps of .* are too small"):
        coded(target, None, 1e-12)
    with pytest.raises(MpocError, match="too large for a grid"):
        round_grid(1e9 * target, None, Grid(4))
    with pytest.raises(MpocError, match="too large to be coded"):
        coded_in_bytes(1e35 * target, None, best_exponents(None, 4), best_exponents(None, 32), 100)
    with pytest.raises(UsageError, match="does not divide"):
        round_grid(target, None, Grid(4, 5))
    with pytest.raises(MpocError, match="metric of the inputs is not finite"):
        Feedback(torch.full((4, 4), float("nan")))
    with pytest.raises(MpocError, match="not positive semi-definite"):
        Feedback(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_typical_errors_cost_what_is_predicted() -> None:
    metric = correlated(24)
    feedback, generator = Feedback(metric), torch.Generator().manual_seed(0)
    steps = (0.1 + torch.rand(24, generator=generator)).expand(4000, 24)
    error = typical_error(steps, feedback, generator)
    assert cost(error, torch.zeros_like(error), metric) == pytest.approx(price(steps, feedback), rel=0.03)
    assert float(typical_error(steps, None, generator).abs().max()) <= float(steps.max()) / 2
    outputs = correlated(32, 5)
    rows, steps = Feedback(outputs), steps[:32]
    errors = [typical_error(steps, feedback, generator, rows).double() for _ in range(200)]
    squared = [float(((outputs.double() @ error @ metric.double()) * error).sum()) for error in errors]
    assert sum(squared) / 200 == pytest.approx(price(steps, feedback, rows.weights), rel=0.03)
