"""The descent against gradients by autograd, known optima, and what it must never do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpoc.tensor_networks.fit.lbfgs import LBFGS
from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import by_eq_5, random_cores
from tests.tensor_networks.fit.metrics import diagonal_metric, random_metric

STRUCTURE = make_structure("linear", (12, 12), factors=((2, 3, 2), (3, 1, 4)))


def start(structure: Structure, bond: int, metric: Metric) -> LBFGS:
    return LBFGS(metric, form_of(random_cores(structure, bond, seed=4), structure))


def test_value_and_gradient_match_the_formula() -> None:
    metric = random_metric(12, 12)
    descent = start(STRUCTURE, 3, metric)
    expected = metric.value(by_eq_5(descent.form.cores, STRUCTURE))
    assert descent.point.value == pytest.approx(expected, rel=1e-12)
    vector = descent.point.vector
    for place in range(0, len(vector), 7):
        shift = torch.zeros_like(vector)
        shift[place] = 1e-5
        ends = [by_eq_5(descent._split(vector + sign * shift), STRUCTURE) for sign in (1, -1)]
        slope = (metric.value(ends[0]) - metric.value(ends[1])) / 2e-5
        assert float(descent.point.gradient[place]) == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("form_name", ["mpo", "tree", "mera"])
def test_every_step_lowers_the_objective(form_name: str) -> None:
    metric = random_metric(12, 12, seed=2)
    descent = start(replace(STRUCTURE, form=form_name), 3, metric)
    values = [descent.point.value]
    for _ in range(60):
        assert descent.run(1)
        values.append(metric.value(descent.form.to_matrix()[0]))
        assert values[-1] < values[-2]
    assert values[-1] < 0.2 * values[0]


def test_reaches_the_closed_form_for_low_rank() -> None:
    structure = make_structure("linear", (8, 6), factors=((8, 1), (1, 6)))
    metric = random_metric(8, 6, weighted_outputs=False)
    metric = Metric(metric.target, metric.inputs + 0.1 * torch.eye(6, dtype=torch.float64))
    descent = start(structure, 2, metric)
    descent.run(300)
    optimum = float(weighted_svd(metric).values[2:].square().sum())
    assert optimum * (1 - 1e-9) < descent.point.value < optimum * (1 + 1e-6)


def test_reports_convergence() -> None:
    cores = random_cores(STRUCTURE, 3, seed=4)
    target = MPO(cores, STRUCTURE).to_matrix()[0]
    descent = LBFGS(Metric(target, torch.eye(12, dtype=torch.float64)), MPO(cores, STRUCTURE))
    assert not descent.run(5)
    torch.testing.assert_close(descent.form.to_matrix()[0], target)


def test_path_does_not_depend_on_the_gauge() -> None:
    metric = random_metric(12, 12)
    cores = random_cores(STRUCTURE, 3, seed=4)
    gauge = torch.linalg.qr(random_cores(STRUCTURE, 3)[1].flatten(0, 2)[:3, :3])[0] * 3.0
    changed = [cores[0] @ gauge, torch.einsum("ab,bjic->ajic", torch.linalg.inv(gauge), cores[1]), cores[2]]
    paths: list[Tensor] = []
    for at in (cores, changed):
        descent = LBFGS(metric, MPO(at, STRUCTURE))
        descent.run(3)
        paths.append(descent.form.to_matrix()[0])
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-2, atol=1e-2)


def test_handles_zero_cores() -> None:
    cores = [torch.zeros_like(core) for core in random_cores(STRUCTURE, 2)]
    descent = LBFGS(random_metric(12, 12), MPO(cores, STRUCTURE))
    assert not descent.run(1)
    assert all(not core.any() for core in descent.form.cores)


def test_diagonal_metric_is_not_formed() -> None:
    found, expected = (start(STRUCTURE, 3, metric).point for metric in diagonal_metric(12, 12))
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    torch.testing.assert_close(found.gradient, expected.gradient)
