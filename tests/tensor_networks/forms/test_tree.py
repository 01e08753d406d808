"""Schmidt values, entropies and gauge of trees against direct SVDs of every branch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.tree import Tree, tree_chain
from mpoc.tensor_networks.structure import Structure, make_structure
from mpoc.tensor_networks.topology import branches
from tests.support.weights import random_cores

SOME = settings(max_examples=25, deadline=None, derandomize=True)


def structure(sites: int, factor: int = 2) -> Structure:
    factors = (factor,) * sites, tuple(2 + k % 2 for k in range(sites))
    sides = math.prod(factors[0]), math.prod(factors[1])
    return make_structure("linear", sides, factors=factors, form="tree")


def random_tree(structure: Structure, bond: int, seed: int = 0) -> Tree:
    return Tree(random_cores(structure, bond, seed), structure)


def unfoldings(tree: Tree) -> list[np.ndarray]:
    """Of the dense weight: the sites of each branch against all others."""
    tensor = interleave(tree.to_weight(), tree.structure).numpy()
    found = []
    for span in branches(tensor.ndim):
        axes = list(range(span.start, span.stop))
        rows = math.prod(tensor.shape[k] for k in axes)
        found.append(np.moveaxis(tensor, axes, range(len(axes))).reshape(rows, -1))
    return found


@pytest.mark.slow
@SOME
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 9))
def test_spectra_and_entropies_match_direct_svds(sites: int, bond: int, seed: int) -> None:
    tree = random_tree(structure(sites), bond, seed)
    spectra, entropies = tree.spectra(), tree.entropies()
    for found, entropy, direct in zip(spectra, entropies, unfoldings(tree), strict=True):
        values = np.linalg.svd(direct, compute_uv=False)
        np.testing.assert_allclose(found.numpy(), values[: len(found)], atol=1e-9 * values[0])
        p = values[values > 1e-12 * values[0]] ** 2 / (values**2).sum()
        assert entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)


@pytest.mark.slow
@SOME
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 9))
def test_balanced_keeps_the_weight_with_equal_sides(sites: int, bond: int, seed: int) -> None:
    tree = random_tree(structure(sites), bond, seed)
    balanced, spectra = tree.balanced()
    torch.testing.assert_close(balanced.to_matrix(), tree.to_matrix(), rtol=1e-9, atol=1e-9)
    for span, direct, values in zip(branches(sites), unfoldings(tree), spectra, strict=True):
        below = balanced.branch(span).numpy()
        rest = np.linalg.lstsq(below, direct, rcond=None)[0]
        schmidt = np.diag(values.numpy())
        np.testing.assert_allclose(below.T @ below, schmidt, atol=1e-9 * schmidt[0, 0])
        np.testing.assert_allclose(rest @ rest.T, schmidt, atol=1e-8 * schmidt[0, 0])


def test_cuts_empty_branches() -> None:
    one = structure(4, factor=3)
    tree = random_tree(one, 2)
    shapes = one.core_shapes(one.bonds(5))
    padded = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for core, small in zip(padded, tree.cores, strict=True):
        core[tuple(slice(size) for size in small.shape)] = small
    wide = Tree(padded, one)
    assert set(wide.bonds) == {5}
    balanced, _ = wide.balanced()
    assert balanced.bonds == tree.bonds
    torch.testing.assert_close(balanced.to_matrix(), tree.to_matrix())


def test_zero_cores_stay_zero() -> None:
    one = structure(5)
    balanced, spectra = Tree([torch.zeros(s) for s in one.core_shapes(one.bonds(3))], one).balanced()
    assert not balanced.to_matrix().any() and set(balanced.bonds) == {1}
    assert not torch.cat(spectra).any() and balanced.entropies() == [0.0] * 7


def test_tree_of_two_sites_matches_a_chain() -> None:
    for sites in (1, 2, 3, 5):
        tree = random_tree(structure(sites), 3)
        matrix = tree_chain(tree.cores)[0]
        for core in tree_chain(tree.cores)[1:]:
            matrix = torch.einsum("ajib,bklc->ajkilc", matrix, core).flatten(3, 4).flatten(1, 2)
        torch.testing.assert_close(matrix[0, :, :, 0], tree.to_matrix()[0])
