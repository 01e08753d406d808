"""Gram matrices of all beyond each bond, against those of the dense weight's derivative by a core."""

from dataclasses import replace

import pytest
import torch

from mpoc.tensor_networks.fit.lbfgs import inverse_grams
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.marks import slow_except
from tests.support.weights import random_cores

FOUR = make_structure("linear", (24, 24), factors=((2, 3, 2, 2), (3, 1, 4, 2)))
SIX = make_structure("linear", (64, 1), factors=((2,) * 6, (1,) * 6))


def curvature(form: Form, k: int) -> torch.Tensor:
    """JᵀJ of the weight as a function of core k alone."""

    def weight(core: torch.Tensor) -> torch.Tensor:
        return form_of([*form.cores[:k], core, *form.cores[k + 1 :]], form.structure).to_matrix().flatten()

    derivative = torch.autograd.functional.jacobian(weight, form.cores[k]).flatten(1)
    return derivative.T @ derivative


@pytest.mark.parametrize("form_name", slow_except(["mpo", "tree"], "mpo"))
@pytest.mark.parametrize("structure", [pytest.param(FOUR, marks=pytest.mark.slow), SIX], ids=["four", "six"])
def test_environments_are_the_curvature_of_each_core(structure: Structure, form_name: str) -> None:
    """Of a network without loops: a product over the bonds, and the identity on the sites' own legs."""
    form = form_of(random_cores(one := replace(structure, form=form_name), 2), one)
    for k, (core, inverses) in enumerate(zip(form.cores, inverse_grams(form.cores, form.legs), strict=True)):
        product = torch.ones(1, 1, dtype=torch.float64)
        for axis, size in enumerate(core.shape):
            own = torch.linalg.inv(inverses[axis]) if axis in inverses else torch.eye(size).double()
            product = torch.kron(product, own.contiguous())
        expected = curvature(form, k)
        torch.testing.assert_close(product, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_networks_with_loops_have_no_environments() -> None:
    mera = replace(SIX, form="mera")
    form = form_of(random_cores(mera, 2), mera)
    assert not any(inverse_grams(form.cores, form.legs))


def test_inverts_singular_and_zero_grams() -> None:
    tree = replace(FOUR, form="tree")
    cores = random_cores(tree, 3)
    for scale in (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])):
        cores[2] = cores[2] * scale
        legs = form_of(cores, tree).legs
        assert all(
            inverse.isfinite().all() for found in inverse_grams(cores, legs) for inverse in found.values()
        )
