"""What is known of embeddings and of convolutions with groups, against sums over the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoc.compression.calibrate.calibrated_fit import FitSettings, Storage, fit_calibrated
from mpoc.compression.calibrate.moments import Accumulator, one_hot_moments
from mpoc.compression.calibrate.objective import EmbeddingObjective, GroupedObjective, LayerObjective
from mpoc.tensor_networks.fit.weighted import matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure
from tests.tensor_networks.fit.metrics import random_moment

VOCABULARY, WIDTH = 30, 8
LOW_RANK = low_rank_structure("embedding", (VOCABULARY, WIDTH))
CHAIN = make_structure("embedding", (VOCABULARY, WIDTH), factors=((5, 6), (4, 2)))


def tokens(count: int, seed: int) -> Tensor:
    """Few of them often; the last five never."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(1, VOCABULARY - 4).double().reciprocal()
    return torch.multinomial(shares, count, replacement=True, generator=generator)


def table(seed: int = 0) -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(seen: Tensor, unseen: Tensor) -> EmbeddingObjective:
    mine, other = (one_hot_moments(torch.bincount(part, minlength=VOCABULARY)) for part in (seen, unseen))
    return EmbeddingObjective(mine, other, random_moment(WIDTH, seed=3))


def test_errors_match_those_of_the_tokens() -> None:
    seen, unseen = tokens(200, 0), tokens(50, 1)
    objective, matrix, found = known(seen, unseen), table(), table(1)
    error = matrix - found
    for norm, part in ((objective.fit_error, seen), (objective.held_out_error, unseen)):
        expected = error[part].norm() / matrix[part].norm()
        assert norm.relative(matrix, found) == pytest.approx(float(expected), rel=1e-9)
    expected = torch.einsum("ni,ij,nj->", error[unseen], objective.outputs, error[unseen]) / 50
    assert objective.output_weighted_error.squared(matrix, found) == pytest.approx(float(expected), rel=1e-9)
    together = objective.together().fit_error.squared(matrix, found)
    assert together == pytest.approx(float(error[torch.cat([seen, unseen])].square().sum()) / 250, rel=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_held_out_rows_of_a_wide_layer_are_taken_into_the_fit_as_rows(centred: bool) -> None:
    generator, width = torch.Generator().manual_seed(4), 1100  # of a few rows no matrix is formed

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        dense = torch.randn(count, width, generator=generator) + 1
        return dense + 0.1 * torch.randn(count, width, generator=generator), dense

    seen, unseen = inputs(1400), inputs(60)
    sums = [Accumulator(keeps_rows=True), Accumulator(keeps_rows=True)]
    for one, part in zip(sums, (seen, unseen), strict=True):
        one.add(*part)
    objective = LayerObjective(sums[0].moments(), sums[1].moments(), None, centred)
    weight = torch.randn(3, width, generator=generator, dtype=torch.float64)
    found = 0.9 * weight
    errors = (
        torch.cat([seen[1], unseen[1]]) @ weight.T.float() - torch.cat([seen[0], unseen[0]]) @ found.T.float()
    )
    errors = errors - errors.mean(0) if centred else errors
    together = objective.together()
    expected = float(errors.double().square().sum()) / 1460
    assert together.fit_error.squared(weight, found) == pytest.approx(expected, rel=1e-3)
    # The target is where the gradient of the error is zero
    metric = together.metric(weight, 0.0)
    steps = [together.fit_error.squared(weight, metric.target + step * weight) for step in (-1e-3, 0, 1e-3)]
    assert steps[1] < min(steps[0], steps[2])


def test_metric_smooths_over_all_rows() -> None:
    objective, matrix, found = known(tokens(200, 0), tokens(50, 1)), table(), table(1)
    uniform = known(torch.arange(VOCABULARY), tokens(50, 1))
    values = [one.metric(matrix, gamma).value(found) for one, gamma in ((objective, 0.0), (uniform, 0.0))]
    mixed = objective.metric(matrix, 0.3).value(found)
    assert mixed == pytest.approx(0.7 * values[0] + 0.3 * values[1], rel=1e-9)


def test_errors_of_all_ranks_match_single_fits() -> None:
    objective, matrix = known(tokens(200, 0), tokens(50, 1)), table()
    best = weighted_svd(objective.metric(matrix, 0.1))
    errors = objective.output_weighted_error.of_ranks(matrix, best.left, best.right)
    for rank in range(1, WIDTH):
        expected = objective.output_weighted_error.squared(matrix, best.left[:, :rank] @ best.right[:rank])
        assert float(errors[rank - 1]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
def test_fit_generalises_to_other_texts(structure: Structure) -> None:
    objective, matrix = known(tokens(200, 0), tokens(50, 1)), table()
    fit = fit_calibrated(matrix, [Storage(structure, 3)], objective, FitSettings(torch.float64))
    assert fit.judged.shift is None
    assert fit.gamma in (
        EmbeddingObjective.gammas if structure is LOW_RANK else (EmbeddingObjective.mpo_gamma,)
    )
    assert fit.same_size["this"] < 0.9 * fit.same_size["plain svd" if structure is LOW_RANK else "plain mpo"]


def test_low_rank_rows_never_lose_to_zero() -> None:
    """Not even those that never occurred; of MPOs, whose rows share cores, this does not hold."""
    metric = known(tokens(200, 0), tokens(50, 1)).metric(table(), 0.1)
    best = weighted_svd(metric)
    for rank in range(1, WIDTH):
        error = table() - best.left[:, :rank] @ best.right[:rank]
        lost, whole = (((rows @ metric.inputs) * rows).sum(1) for rows in (error, table()))
        assert bool((lost <= whole * (1 + 1e-9)).all())


@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
def test_exact_at_full_bond(structure: Structure) -> None:
    fit = fit_calibrated(
        table(),
        [Storage(structure, structure.full_bond)],
        known(tokens(200, 0), tokens(50, 1)),
        FitSettings(torch.float64),
    )
    torch.testing.assert_close(matrix_of(fit.form), table(), rtol=1e-6, atol=1e-6)


def test_handles_a_layer_without_effect() -> None:
    objective = known(tokens(200, 0), tokens(50, 1))
    deaf = EmbeddingObjective(objective.moments, objective.held_out, torch.zeros_like(objective.outputs))
    for structure in (LOW_RANK, CHAIN):
        fit = fit_calibrated(table(), [Storage(structure, 3)], deaf, FitSettings(torch.float64))
        assert bool(matrix_of(fit.form).isfinite().all())


def test_groups_have_the_errors_of_each_by_itself() -> None:
    """On inputs of one moment up to a factor in each group; and the mean of each is corrected."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 5, generator=generator, dtype=torch.float64
    )
    factors, means = torch.tensor([0.5, 2.0, 7.0]).double(), torch.tensor([1.0, -3.0, 0.2]).double()
    given = (rows - rows.mean(0)) * factors[:, None, None] + means[:, None, None]  # (groups, n, N_x)
    sums = Accumulator()
    sums.add(given)
    moments = sums.moments()
    objective = GroupedObjective.of(moments, moments, 6, centred=True)
    weight, other = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    errors = torch.stack([given[k] @ (weight - other)[2 * k : 2 * k + 2].T for k in range(3)], dim=1).flatten(
        1
    )  # (n, N_y)
    assert objective.fit_error.squared(weight, other) == pytest.approx(
        float(errors.var(0, correction=0).sum())
    )
    shift = objective.shift(weight, other)
    assert shift is not None and torch.allclose(shift, errors.mean(0))
