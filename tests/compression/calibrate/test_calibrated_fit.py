"""One layer fitted to rows: against sums over the rows themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, unfold

from mpoc.compression.calibrate.calibrated_fit import CalibratedFit, FitSettings, Storage, fit_calibrated
from mpoc.compression.calibrate.moments import Accumulator
from mpoc.compression.calibrate.objective import LayerObjective, one_matrix
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.fit.weighted import matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure

N_Y, N_X = 12, 20


def rows(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x̃ and x, correlated, of falling scales, with means."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, N_X, generator=generator, dtype=torch.float64)
    x = draw[0] * torch.logspace(0, -2, N_X) + torch.linspace(-1, 1, N_X)
    mixing = torch.randn(N_X, N_X, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = x @ mixing / N_X**0.5
    return x + 0.1 * draw[1] * x.std() + 0.05, x


def objective(
    given: Tensor, dense: Tensor, held: tuple[Tensor, Tensor], centred: bool = True
) -> LayerObjective:
    found = []
    for mine, theirs in ((given, dense), held):
        sums = Accumulator()
        sums.add(mine, theirs)
        found.append(sums.moments())
    return LayerObjective(found[0], found[1], None, centred)


def a_weight(seed: int = 1) -> Tensor:
    return torch.randn(N_Y, N_X, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit_of(
    structure: Structure, bond: int, known: LayerObjective, weight: Tensor | None = None, rank: int = 0
) -> CalibratedFit:
    weight = a_weight() if weight is None else weight
    return fit_calibrated(weight, [Storage(structure, bond, rank)], known, FitSettings(torch.float64))


LOW_RANK = low_rank_structure("linear", (N_Y, N_X))
CHAIN = make_structure("linear", (N_Y, N_X), factors=((3, 4), (5, 4)))


@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
@pytest.mark.parametrize("centred", [True, False])
def test_errors_match_those_of_the_input_rows(structure: Structure, centred: bool) -> None:
    given, held = rows(), rows(seed=5)
    fit = fit_of(structure, 3, objective(*given, held, centred))
    everything = [torch.cat([a, b]) for a, b in zip(given, held, strict=True)]
    error = everything[1] @ a_weight().T - everything[0] @ matrix_of(fit.form).T
    whole = everything[1] @ a_weight().T
    if centred:
        assert fit.judged.shift is not None
        torch.testing.assert_close(error.mean(0), fit.judged.shift)
        error, whole = error - fit.judged.shift, whole - whole.mean(0)
    assert fit.judged.output_error == pytest.approx(float(error.norm() / whole.norm()), rel=1e-6)
    assert (fit.judged.shift is None) == (not centred)


@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
def test_exact_at_full_bond_on_dense_inputs(structure: Structure) -> None:
    x = rows()[1]
    fit = fit_of(structure, structure.full_bond, objective(x, x, (x, x)))
    torch.testing.assert_close(matrix_of(fit.form), a_weight())
    assert fit.judged.output_error < 1e-6
    assert fit.judged.relative_error < 1e-6


@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
def test_beats_plain_tt_svd(structure: Structure) -> None:
    x, other = rows()[1], rows(seed=5)[1]
    known = objective(x, x, (other, other))
    plain = tt_svd(a_weight(), structure, Truncation(3)).form
    fitted = matrix_of(fit_of(structure, 3, known).form)
    for norm in (known.fit_error, known.held_out_error):
        assert norm.relative(a_weight(), fitted) < norm.relative(a_weight(), matrix_of(plain))


def test_error_never_rises_with_the_bond() -> None:
    known = objective(*rows(), rows(seed=5))
    errors = [fit_of(LOW_RANK, bond, known).judged.output_error for bond in range(1, N_Y)]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))


def test_compensates_for_changed_inputs() -> None:
    """Inputs twice as large: the best weight is half as large, though W is what was asked for."""
    x = rows()[1]
    fit = fit_of(LOW_RANK, N_Y, objective(2 * x, x, (2 * x, x)))
    assert fit.judged.output_error < 1e-3
    assert fit.judged.relative_error == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", ["one row", "constant", "dead unit", "zero weight"])
@pytest.mark.parametrize("structure", [LOW_RANK, CHAIN])
def test_handles_few_and_constant_inputs(kind: str, structure: Structure) -> None:
    x = rows()[1]
    weight = a_weight()
    if kind == "one row":
        x = x[:1]
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "dead unit":
        x[:, 3] = 0
    else:
        weight = torch.zeros_like(weight)
    fit = fit_of(structure, 3, objective(x, x, (x, x)), weight)
    assert bool(torch.isfinite(matrix_of(fit.form)).all())
    assert 0 <= fit.judged.output_error <= 1 + 1e-9
    assert fit.gamma in (*LayerObjective.gammas, LayerObjective.mpo_gamma)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_auto_never_loses_to_whitened_svd(rank: int, seed: int) -> None:
    """Neither on the objective of the fit, nor, of all that were tried, on held-out inputs."""
    known = objective(*rows(seed=seed), rows(seed=seed + 10))
    probes = torch.randn(40, N_Y, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    known = replace(known, outputs=probes.T @ probes / 40)
    weight = a_weight(seed)
    two = Storage(LOW_RANK, rank)
    chain = Storage(CHAIN, max(b for b in range(1, 12) if CHAIN.num_parameters(b) <= two.num_parameters))
    one = fit_calibrated(weight, [two], known, FitSettings(torch.float64, fast=True))
    both = one, fit_calibrated(weight, [chain, two], known, FitSettings(torch.float64))
    assert both[1].same_size["this"] <= both[0].same_size["this"]
    metric = known.together().metric(weight, both[0].gamma)
    left, right = weighted_svd(known.together().whitened(weight)).factors(rank)
    assert metric.value(matrix_of(both[0].form)) <= metric.value(left @ right) * (1 + 1e-9)


def test_sum_beats_its_terms() -> None:
    x, other = rows()[1], rows(seed=5)[1]
    known = objective(x, x, (other, other))
    generator = torch.Generator().manual_seed(3)
    chain = MPO(
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in CHAIN.core_shapes((1, 2, 1))],
        CHAIN,
    )
    low = torch.randn(N_Y, 2, generator=generator, dtype=torch.float64)
    low = low @ torch.randn(2, N_X, generator=generator, dtype=torch.float64)
    weight = matrix_of(chain) + low
    fits = [
        fit_calibrated(weight, [storage], known, FitSettings(torch.float64))
        for storage in (Storage(CHAIN.as_form("svd+mpo"), 2, 2), Storage(CHAIN, 4), Storage(LOW_RANK, 4))
    ]
    assert [len(fit.form.terms) for fit in fits] == [2, 1, 1]
    assert fits[0].judged.held_out_error < 0.5 * min(fit.judged.held_out_error for fit in fits[1:])


def test_kernel_matrix_multiplies_patches() -> None:
    kernel, x = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    patches = unfold(x, 3).unflatten(1, (4, 9)).transpose(1, 2).flatten(1, 2)  # taps outermost
    expected = conv2d(x, kernel).flatten(2)
    torch.testing.assert_close(one_matrix(kernel, "conv2d", False) @ patches, expected)


def test_form_matrix_matches_its_weight() -> None:
    structure = make_structure("conv2d", (6, 4, 3, 3))
    kernel = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    form = tt_svd(kernel, structure, Truncation(structure.full_bond)).form
    torch.testing.assert_close(matrix_of(form), one_matrix(kernel, "conv2d", False))
    assert isinstance(form, MPO)
