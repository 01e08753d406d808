"""Sums of an MPO and a low-rank part, against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.forms.stored import forms_of, split, weight_of
from mpoc.tensor_networks.geometry import make_geometry
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.sums import random_sum, sum_weight
from tests.support.weights import EVERY_KIND, by_eq_5, random_cores, shape_id, structures


@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_weight_matches_the_definition(structure: Structure) -> None:
    cores = random_sum(structure)
    found = weight_of(cores, structure)
    assert (found.shape, found.is_contiguous()) == (structure.shape, True)
    torch.testing.assert_close(found, sum_weight(cores, structure))
    torch.testing.assert_close(weight_of(cores[:-2], structure), by_eq_5(cores[:-2], structure))


@given(structures(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_parts_and_counts_match_the_weight(structure: Structure, bond: int, rank: int) -> None:
    cores = random_sum(structure, bond, rank)
    first, added = forms_of(cores, structure)
    assert first.cores + added.cores == cores
    assert first.cores == split(cores, structure)[0]
    assert added.bonds == (1, rank, 1)
    assert first.num_parameters + added.num_parameters == structure.num_parameters(bond, rank)
    torch.testing.assert_close(weight_of(cores, structure), first.to_weight() + added.to_weight())


def test_gradients_reach_every_core() -> None:
    structure = make_structure("conv2d", (4, 6, 2, 1), sites=2)
    cores = [core.requires_grad_() for core in random_sum(structure, 2)]
    assert torch.autograd.gradcheck(lambda *cores: weight_of(cores, structure), cores)


def test_rejects_cores_that_fit_no_form() -> None:
    structure = make_structure("linear", (24, 18))
    cores = random_sum(structure)
    left, right = cores[-2:]
    for wrong in (
        [],
        cores[:-1],
        [*cores, right],
        [*cores[:-2], right, left],
        [*cores[:-1], right[:1]],
        [*cores[:-2], left[:, :-1], right],
        cores[1:],
    ):
        with pytest.raises(ValueError, match=r"cores of shapes|bonds do not meet"):
            forms_of(wrong, structure)


def test_whole_maps_have_no_low_rank_part() -> None:
    geometry = make_geometry((4, 4, 3, 3), (4, 4), (1, 1), (1, 1))
    structure = make_structure("convmap", (4, 4, 3, 3), geometry=geometry)
    cores = random_cores(structure, 2)
    assert len(forms_of(cores, structure)) == 1
    with pytest.raises(ValueError, match="a whole map has no low-rank part"):
        forms_of([*cores, torch.ones(1, 64, 1, 2), torch.ones(2, 1, 64, 1)], structure)
