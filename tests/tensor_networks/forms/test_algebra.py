"""Sums, differences and Kronecker products against dense ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.forms.mpo import MPO, add, kronecker, subtract
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import random_cores, structures

SOME = settings(max_examples=40, deadline=None, derandomize=True)


def random_mpo(structure: Structure, bond: int, seed: int) -> MPO:
    return MPO(random_cores(structure, bond, seed), structure)


@SOME
@given(structures(), st.integers(1, 4), st.integers(1, 4))
def test_sums_and_differences_match_the_weights(structure: Structure, one: int, two: int) -> None:
    first, second = random_mpo(structure, one, 0), random_mpo(structure, two, 1)
    total, difference = add(first, second), subtract(first, second)
    torch.testing.assert_close(total.to_weight(), first.to_weight() + second.to_weight())
    torch.testing.assert_close(difference.to_weight(), first.to_weight() - second.to_weight())
    inner = zip(total.bonds[1:-1], first.bonds[1:-1], second.bonds[1:-1], strict=True)
    assert all(d == a + b for d, a, b in inner)


def test_rejects_sums_of_different_structures() -> None:
    first, second = (random_mpo(make_structure("linear", (n, 8), sites=2), 2, 0) for n in (8, 12))
    with pytest.raises(ValueError, match="different structures"):
        add(first, second)


def test_kronecker_product_matches_torch() -> None:
    a = random_mpo(make_structure("linear", (6, 2), factors=((2, 3), (1, 2))), 2, 0)
    b = random_mpo(make_structure("linear", (4, 6), factors=((4, 1), (2, 3))), 3, 1)
    cores = kronecker([a.cores, b.cores])
    structure = make_structure("linear", (24, 12), factors=((8, 3), (2, 6)))
    product = MPO(cores, structure).to_weight()
    # Site by site (j_1 k_1)(j_2 k_2) rather than (j_1 j_2)(k_1 k_2).
    digits = torch.kron(a.to_weight(), b.to_weight()).reshape(2, 3, 4, 1, 1, 2, 2, 3)
    torch.testing.assert_close(product, digits.permute(0, 2, 1, 3, 4, 6, 5, 7).reshape(24, 12))
