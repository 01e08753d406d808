"""Weighted fits against brute-force least squares, closed forms, and hard moments."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.metric import Metric, make_metric
from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.marks import slow_except
from tests.support.weights import EVERY_KIND, random_cores, random_weight, shape_id, structures
from tests.tensor_networks.fit.metrics import moments, random_metric, row_moments

ONE_MATRIX = [structure for structure in EVERY_KIND if structure.kind != "experts"]
TWO = make_structure("linear", (12, 12), factors=((4, 3), (3, 4)))
THREE = make_structure("linear", (12, 12), factors=((2, 3, 2), (3, 2, 2)))


def metric_for(structure: Structure, weighted: bool = True, rank: int | None = None, seed: int = 0) -> Metric:
    return random_metric(
        structure.outputs, structure.lead * structure.inputs, weighted, (rank, None), seed=seed
    )


def brute_force_value(metric: Metric, form: Form, k: int) -> float:
    """The least f that core k can give with the others as they are: dense least squares over its entries."""
    outputs = metric.output_root
    assert outputs is not None
    columns: list[Tensor] = []
    for place in range(form.cores[k].numel()):
        cores = list(form.cores)
        cores[k] = torch.zeros(cores[k].shape, dtype=torch.float64)
        cores[k].view(-1)[place] = 1.0
        seen = outputs.T @ matrix_of(form_of(cores, form.structure)) @ metric.input_root
        columns.append(seen.flatten())
    matrix = torch.stack(columns, 1)
    target = (outputs.T @ metric.target @ metric.input_root).flatten()
    solution = torch.linalg.lstsq(matrix, target, driver="gelsd").solution
    return float((matrix @ solution - target).square().sum())


@pytest.mark.parametrize("form_name", slow_except(["mpo", "tree"], "mpo"))
@pytest.mark.parametrize(
    "structure", [TWO, THREE, make_structure("conv2d", (6, 4, 2, 2), sites=2)], ids=shape_id
)
def test_no_single_core_can_improve(structure: Structure, form_name: str) -> None:
    structure = replace(structure, form=form_name)
    metric = metric_for(structure)
    fit = Problem(metric, structure).fit(Truncation(3), max_stretches=60, tolerance=1e-6)
    for k in range(len(fit.form.cores)):
        assert brute_force_value(metric, fit.form, k) > (1 - 1e-3) * fit.history[-1]


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(structures(), st.sampled_from(["mpo", "tree"]), st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_objective_never_rises_and_matches_the_result(
    structure: Structure, form_name: str, bond: int, weighted: bool, seed: int
) -> None:
    if structure.kind == "experts":
        return
    structure = replace(structure, form=form_name)
    metric = metric_for(structure, weighted, seed=seed)
    target = Target(torch.float64, seed=seed)
    fit = Problem(metric, structure).fit(Truncation(bond), max_stretches=2, target=target)
    assert all(later < before for before, later in zip(fit.history, fit.history[1:], strict=False))
    least = 1e-20 * metric.value(torch.zeros_like(metric.target))
    assert metric.value(matrix_of(fit.form)) == pytest.approx(fit.history[-1], rel=1e-9, abs=least)
    assert all(have <= cap for have, cap in zip(fit.form.bonds, structure.bonds(bond), strict=True))
    plain = matrix_of(decompose(_as_weight(metric.target, structure), structure, Truncation(bond)).form)
    assert fit.history[0] <= metric.value(plain) * (1 + 1e-5) + least


def _as_weight(matrix: Tensor, structure: Structure) -> Tensor:
    """(N_y, taps · C_in) as the checkpoint stores it."""
    blocks = matrix.reshape(structure.outputs, structure.lead, structure.inputs)
    if structure.kind.startswith("conv"):
        return blocks.transpose(1, 2).reshape(structure.shape)
    return (matrix.T if structure.transposed else matrix).reshape(structure.shape)


@pytest.mark.parametrize("structure", ONE_MATRIX, ids=shape_id)
def test_matrix_has_taps_outermost(structure: Structure) -> None:
    form = tt_svd(random_weight(structure), structure, Truncation(structure.full_bond)).form
    weight = _as_weight(matrix_of(form), structure)
    torch.testing.assert_close(weight, random_weight(structure), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form_name", ["mpo", "tree"])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("structure", ONE_MATRIX, ids=shape_id)
def test_full_bond_is_exact(structure: Structure, rank: int | None, form_name: str) -> None:
    structure = replace(structure, form=form_name)
    width = structure.lead * structure.inputs
    metric = metric_for(structure, rank=None if rank is None else min(rank, width))
    fit = Problem(metric, structure).fit(Truncation(structure.full_bond))
    torch.testing.assert_close(matrix_of(fit.form), metric.target, rtol=1e-10, atol=1e-10)
    assert fit.form.structure == structure


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_starts_at_the_closed_form(rank: int) -> None:
    metric = random_metric(9, 7)
    structure = make_structure("linear", (9, 7), factors=((9, 1), (1, 7)))
    fit = Problem(metric, structure).fit(Truncation(rank), max_stretches=40, tolerance=1e-6)
    optimum = float(weighted_svd(metric).values[rank:].square().sum())
    assert optimum * (1 - 1e-9) <= fit.history[-1] <= optimum * (1 + 1e-3)
    assert fit.history[0] <= optimum * 1.05


@pytest.mark.parametrize("form_name", slow_except(["mpo", "tree"], "mpo"))
@pytest.mark.parametrize("structure", [TWO, THREE], ids=["two", "three"])
def test_beats_an_unweighted_fit(structure: Structure, form_name: str) -> None:
    structure = replace(structure, form=form_name)
    for seed in range(3):
        metric = metric_for(structure, seed=seed)
        plain = matrix_of(decompose(metric.target, structure, Truncation(3)).form)
        fit = Problem(metric, structure).fit(Truncation(3))
        assert fit.history[-1] < 0.5 * metric.value(plain)


@pytest.mark.slow
@pytest.mark.parametrize("structure", [TWO, THREE], ids=["two", "three"])
def test_missing_output_metric_is_the_identity(structure: Structure) -> None:
    metric = metric_for(structure, weighted=False)
    other = Metric(metric.target, metric.inputs, torch.eye(12, dtype=torch.float64))
    problems = (Problem(one, structure) for one in (metric, other))
    first, second = (p.fit(Truncation(3), max_stretches=30, tolerance=1e-5) for p in problems)
    assert first.history[-1] == pytest.approx(second.history[-1], rel=0.01)


@pytest.mark.parametrize("form_name", ["mpo", "tree"])
def test_recovers_an_exact_form(form_name: str) -> None:
    structure = replace(THREE, form=form_name)
    target = form_of(random_cores(structure, 2), structure).to_matrix()[0]
    metric = Metric(target, metric_for(THREE).inputs, metric_for(THREE).outputs)
    fit = Problem(metric, structure).fit(Truncation(2))
    assert fit.history[-1] < 1e-10 * metric.value(torch.zeros_like(target))


@pytest.mark.slow
def test_padding_is_free() -> None:
    structure = make_structure("embedding", (53, 29), sites=2)
    assert structure.padding != (0, 0)
    metric = metric_for(structure)
    fit = Problem(metric, structure).fit(Truncation(6), max_stretches=40, tolerance=1e-5)
    assert fit.form.to_weight().shape == (53, 29)
    assert metric.value(matrix_of(fit.form)) == pytest.approx(fit.history[-1], rel=1e-9)
    assert fit.history[-1] < metric.value(matrix_of(tt_svd(metric.target, structure, Truncation(6)).form))


@pytest.mark.slow
def test_handles_few_samples_and_dead_features() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    for count in (1, 2, 5, 40):
        samples = torch.randn(count, 12, generator=generator, dtype=torch.float64)
        samples[:, 2], samples[:, 5] = 0.0, 7.0
        metric = make_metric(weight, **moments(samples), centred=True, gamma=0, ridge=0, outputs=None)
        for structure in (TWO, THREE):
            fit = Problem(metric, structure).fit(Truncation(3))
            matrix = matrix_of(fit.form)
            assert matrix.isfinite().all()
            errors = (samples - samples.mean(0)) @ (matrix - weight).T
            assert fit.history[-1] == pytest.approx(float(errors.square().sum()) / count, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("which", ["target", "inputs", "outputs"])
def test_zeros_cost_nothing(which: str) -> None:
    parts = {"target": random_weight(TWO), "inputs": torch.eye(12), "outputs": torch.eye(12)}
    parts[which] = torch.zeros(12, 12)
    fit = Problem(Metric(**{name: part.double() for name, part in parts.items()}), TWO).fit(Truncation(2))
    assert fit.history == (0.0,)
    assert matrix_of(fit.form).isfinite().all()


def test_dead_outputs_are_free() -> None:
    metric = metric_for(TWO)
    assert metric.outputs is not None
    metric.outputs[3] = metric.outputs[:, 3] = 0.0
    fit = Problem(metric, TWO).fit(Truncation(3))
    changed = matrix_of(fit.form)
    changed[3] += 100
    assert metric.value(changed) == pytest.approx(fit.history[-1], rel=1e-9)


@pytest.mark.parametrize("form_name", ["mpo", "tree", "mera"])
def test_start_is_kept_or_improved(form_name: str) -> None:
    metric, structure = metric_for(THREE), replace(THREE, form=form_name)
    start = form_of(random_cores(structure, 3), structure)
    fit = Problem(metric, structure).fit(Truncation(3), start=start)
    assert fit.history[0] == pytest.approx(metric.value(matrix_of(start)), rel=1e-12)
    assert fit.history[-1] < 0.1 * fit.history[0]
    kept = Problem(metric, structure).fit(Truncation(3), start=start, max_stretches=0)
    torch.testing.assert_close(matrix_of(kept.form), matrix_of(start), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "structure",
    [
        make_structure("linear", (23, 22), form="mera"),
        make_structure("conv2d", (8, 8, 3, 3), form="mera"),
    ],
    ids=shape_id,
)
def test_mera_starts_from_the_weight_where_the_target_moved(structure: Structure) -> None:
    """The target is far from the weight in directions that inputs hardly have."""
    metric = metric_for(structure, rank=9)
    weight = metric.target
    _, _, seldom = torch.linalg.svd(metric.input_root.T)
    noise = torch.randn(len(weight), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = replace(metric, target=weight + 30 * noise @ seldom[-2:])
    start = Problem(moved, structure, weight).fit(Truncation(2), max_stretches=0)
    same = Problem(metric, structure).fit(Truncation(2), max_stretches=0)
    torch.testing.assert_close(matrix_of(start.form), matrix_of(same.form), rtol=0, atol=0)
    fit = Problem(moved, structure, weight).fit(Truncation(2), max_stretches=4)
    cold = Problem(moved, structure).fit(Truncation(2), max_stretches=4)
    assert fit.history[-1] < start.history[0]
    errors = [float((matrix_of(one.form) - weight).norm()) for one in (fit, cold)]
    assert errors[0] < 0.5 * errors[1]


def test_rejects_starts_and_structures_that_do_not_fit() -> None:
    metric = metric_for(THREE)
    with pytest.raises(ValueError, match="a start with bonds"):
        Problem(metric, THREE).fit(Truncation(2), start=MPO(random_cores(THREE, 3), THREE))
    with pytest.raises(ValueError, match="a start with bonds"):
        Problem(metric, THREE).fit(Truncation(3), start=MPO(random_cores(TWO, 3), TWO))
    with pytest.raises(ValueError, match="experts"):
        Problem(metric, make_structure("experts", (3, 4, 12))).fit(Truncation(2))


@pytest.mark.parametrize("structure", [s for s in ONE_MATRIX if s.form == "mpo"], ids=shape_id)
def test_objective_of_a_sum_never_rises_and_matches_the_result(structure: Structure) -> None:
    metric, problem = metric_for(structure), Problem(metric_for(structure), structure.as_form("svd+mpo"))
    fit = problem.fit(Truncation(2, rank=2), max_stretches=4)
    assert [term.structure for term in fit.form.terms] == [structure, structure.as_low_rank()]
    assert max(fit.form.bonds) <= 2
    assert all(later < before for before, later in zip(fit.history, fit.history[1:], strict=False))
    least = 1e-20 * metric.value(torch.zeros_like(metric.target))
    assert metric.value(matrix_of(fit.form)) == pytest.approx(fit.history[-1], rel=1e-9, abs=least)
    optimum = weighted_svd(metric).values[2:].square().sum()
    assert fit.history[-1] <= float(optimum) * (1 + 1e-9) + least
    again = problem.fit(Truncation(2, rank=2), start=fit.form, max_stretches=0)
    torch.testing.assert_close(matrix_of(again.form), matrix_of(fit.form), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_recovers_exact_sums() -> None:
    """Other minima are near them: a few descents reach the sum itself, and none ends far away."""
    left = []
    for seed in range(4):
        torch.manual_seed(seed)
        low = torch.randn(12, 2).double() @ torch.randn(2, 12).double()
        target = MPO(random_cores(TWO, 2), TWO).to_matrix()[0] + low
        metric = Metric(target, metric_for(TWO).inputs, metric_for(TWO).outputs)
        problem = Problem(metric, TWO.as_form("svd+mpo"))
        fit = problem.fit(Truncation(2, rank=2), max_stretches=60, tolerance=1e-6)
        left.append(fit.history[-1] / float(metric.value(torch.zeros_like(target))))
    assert min(left) < 1e-6 and max(left) < 1e-3


def test_cores_are_balanced_and_in_the_requested_dtype() -> None:
    fit = Problem(metric_for(THREE), THREE).fit(Truncation(3), target=Target(torch.float32))
    assert {core.dtype for core in fit.form.cores} == {torch.float32}
    norms = [float(core.double().norm()) for core in fit.form.cores]
    assert max(norms) < 4 * min(norms)
    left = fit.form.cores[0].double().flatten(0, 2)
    right = torch.einsum("ajib,bklc->ajiklc", *(core.double() for core in fit.form.cores[1:])).flatten(1)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-5, atol=1e-5 * math.prod(norms))


def test_is_deterministic() -> None:
    metric = metric_for(THREE)
    first, second = (Problem(metric, THREE).fit(Truncation(3)) for _ in range(2))
    assert first.history == second.history
    assert all(map(torch.equal, first.form.cores, second.form.cores))


@pytest.mark.parametrize("shape", [(6, 5, 3, 1), (4, 24, 1, 1)], ids=str)
def test_rows_lead_to_the_same_fit(shape: tuple[int, ...]) -> None:
    structure = make_structure("conv2d", shape, sites=2)
    width = structure.lead * structure.inputs
    samples = torch.randn(10, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(
        1
    )
    target = random_metric(structure.outputs, width).target
    options: dict[str, Any] = {"centred": True, "gamma": 0.1, "ridge": 1e-6, "outputs": None}
    found, wanted = (
        Problem(make_metric(target, **known(samples), **options), structure).fit(Truncation(3))
        for known in (row_moments, moments)
    )
    assert found.history[0] == pytest.approx(wanted.history[0], rel=1e-4)
    assert found.history[-1] == pytest.approx(wanted.history[-1], rel=0.02)
