"""Sums of an MPO and a low-rank part, against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave, from_matrix, to_matrix
from mpoc.tensor_networks.geometry import make_geometry
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.sums import random_sum, sum_of, sum_weight
from tests.support.weights import EVERY_KIND, random_weight, shape_id, structures


@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_weight_matches_the_definition(structure: Structure) -> None:
    cores = random_sum(structure)
    found = form_of(cores, sum_of(structure)).to_weight()
    assert (found.shape, found.is_contiguous()) == (structure.shape, True)
    torch.testing.assert_close(found, sum_weight(cores, structure))


@given(structures(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_parts_and_counts_match_the_weight(structure: Structure, bond: int, rank: int) -> None:
    cores = random_sum(structure, bond, rank)
    whole = form_of(cores, sum_of(structure))
    first, added = whole.terms
    assert first.cores + added.cores == cores
    assert len(added.cores) == 2 and added.bonds == (1, rank, 1)
    assert whole.bonds == sum_of(structure).bonds(bond, rank)
    assert whole.num_parameters == sum_of(structure).num_parameters(bond, rank)
    torch.testing.assert_close(whole.to_weight(), first.to_weight() + added.to_weight())
    column, one = whole.halves()
    torch.testing.assert_close(deinterleave(column @ one, structure), whole.to_weight())


def test_gradients_reach_every_core() -> None:
    structure = sum_of(make_structure("conv2d", (4, 6, 2, 1), sites=2))
    cores = [core.requires_grad_() for core in random_sum(structure, 2)]
    assert torch.autograd.gradcheck(lambda *cores: form_of(cores, structure).to_weight(), cores)


def test_rejects_cores_that_fit_no_form() -> None:
    structure = make_structure("linear", (24, 18))
    cores = random_sum(structure)
    left, right = cores[-2:]
    for wrong in (
        [],
        cores[:-1],
        cores[:-2],
        [*cores, right],
        [*cores[:-2], right, left],
        [*cores[:-1], right[:1]],
        [*cores[:-2], left[:, :-1], right],
        cores[1:],
    ):
        with pytest.raises(ValueError, match=r"cores of shapes|bonds do not meet"):
            form_of(wrong, sum_of(structure))


def test_whole_maps_have_no_low_rank_part() -> None:
    geometry = make_geometry((4, 4, 3, 3), (4, 4), (1, 1), (1, 1))
    structure = make_structure("convmap", (4, 4, 3, 3), geometry=geometry)
    with pytest.raises(ValueError, match="a whole map has no low-rank part"):
        sum_of(structure)


@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_plain_fit_is_the_best_matrix_and_tt_svd_of_the_rest(structure: Structure) -> None:
    weight, low_rank = random_weight(structure), structure.as_low_rank()
    fit = decompose(weight, sum_of(structure), Truncation(2, rank=1))
    left, values, right = torch.linalg.svd(to_matrix(weight, low_rank)[0], full_matrices=False)
    best = from_matrix((left[:, :1] * values[:1] @ right[:1])[None], low_rank)
    expected = best + decompose(weight - best, structure, Truncation(2)).form.to_weight()
    torch.testing.assert_close(fit.form.to_weight(), expected)
    error = float((expected - weight).norm() / weight.norm())
    assert fit.relative_error == pytest.approx(error, abs=1e-12)
