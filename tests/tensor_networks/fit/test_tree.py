"""Hierarchical SVD against projections of the whole weight by numpy, and the error that it reports."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import Fit, tree_svd, tt_svd
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave, interleave
from mpoc.tensor_networks.forms.tree import Tree
from mpoc.tensor_networks.structure import Structure, make_structure
from mpoc.tensor_networks.topology import branches
from tests.support.weights import EVERY_KIND, random_weight, shape_id, structures
from tests.tensor_networks.fit.discarded import fit_and_discarded

SOME = settings(max_examples=30, deadline=None, derandomize=True)
BONDS = st.integers(1, 8)
TREES = structures().map(lambda one: replace(one, form="tree"))


def unfolding(tensor: np.ndarray, span: range) -> np.ndarray:
    """The sites of a branch against all others."""
    axes = list(range(span.start, span.stop))
    rows = math.prod(tensor.shape[k] for k in axes)
    return np.moveaxis(tensor, axes, range(len(axes))).reshape(rows, -1)


def discarded_by_numpy(tensor: np.ndarray, max_bond: int) -> list[float]:
    """The whole weight projected on the leading singular vectors of branch after branch (Grasedyck 2010)."""
    lost = []
    for span in sorted(branches(tensor.ndim), key=len):
        left, values, _ = np.linalg.svd(unfolding(tensor, span), full_matrices=False)
        lost.append(float((values[max_bond:] ** 2).sum()))
        axes = list(range(span.start, span.stop))
        moved = np.moveaxis(tensor, axes, range(len(axes)))
        basis = left[:, :max_bond]
        projected = (basis @ (basis.T @ unfolding(tensor, span))).reshape(moved.shape)
        tensor = np.moveaxis(projected, range(len(axes)), axes)
    return lost


def bonds_by_numpy(tensor: np.ndarray, discard: float) -> list[int]:
    """Each branch's smallest bond, from the sites upwards, that loses at most a share of what is left."""
    bonds = {}
    for span in sorted(branches(tensor.ndim), key=len):
        left, values, _ = np.linalg.svd(unfolding(tensor, span), full_matrices=False)
        tails = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
        bonds[span] = max(1, int((tails > discard * tails[0]).sum()))
        basis = left[:, : bonds[span]]
        axes = list(range(span.start, span.stop))
        shape = np.moveaxis(tensor, axes, range(len(axes))).shape
        projected = (basis @ (basis.T @ unfolding(tensor, span))).reshape(shape)
        tensor = np.moveaxis(projected, range(len(axes)), axes)
    return [bonds[span] for span in branches(tensor.ndim)]


@SOME
@given(TREES, st.sampled_from([0.03, 0.1, 0.3]))
def test_branches_discard_at_most_their_share(structure: Structure, discard: float) -> None:
    weight = random_weight(structure)
    fit = tree_svd(weight, structure, Truncation(structure.full_bond, discard=discard))
    tensor = interleave(weight, structure).numpy()
    assert list(fit.form.bonds) == bonds_by_numpy(tensor, discard)


def relative_error(weight: Tensor, fit: Fit) -> float:
    """Of the stored cores, all in float64."""
    found = form_of([core.double() for core in fit.form.cores], fit.form.structure).to_weight()
    return float((found - weight.double()).norm() / weight.double().norm())


@SOME
@given(TREES, BONDS)
def test_squared_error_is_the_sum_of_discarded_squares(structure: Structure, bond: int) -> None:
    weight = random_weight(structure)
    tensor = interleave(weight, structure).numpy()
    fit, lost = fit_and_discarded(tree_svd, weight, structure, bond)
    norm = float(weight.norm()) ** 2
    assert lost == pytest.approx(sum(discarded_by_numpy(tensor, bond)), rel=1e-9, abs=1e-12 * norm)
    if not any(structure.padding):
        assert fit.relative_error**2 * norm == pytest.approx(lost, rel=1e-9, abs=1e-12 * norm)
    else:  # errors in the padding are not counted
        assert fit.relative_error**2 * norm <= lost * (1 + 1e-9) + 1e-12 * norm


@SOME
@given(TREES, BONDS)
def test_is_close_to_the_best_tree(structure: Structure, bond: int) -> None:
    """No tree errs less than any branch alone must; all of them together are at most 2n − 3 times that."""
    weight = random_weight(structure)
    tensor = interleave(weight, structure).numpy()
    values = (np.linalg.svd(unfolding(tensor, span), compute_uv=False) for span in branches(tensor.ndim))
    tails = [float((found[bond:] ** 2).sum()) for found in values]
    best = max(tails, default=0.0)
    squared = float((tree_svd(weight, structure, Truncation(bond)).relative_error * weight.norm()) ** 2)
    rounding = 1e-12 * float(weight.norm()) ** 2
    assert squared <= sum(tails) * (1 + 1e-9) + rounding
    assert squared <= max(1, 2 * tensor.ndim - 3) * best * (1 + 1e-9) + rounding


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_full_bond_is_exact(structure: Structure, dtype: torch.dtype, limit: float) -> None:
    structure = replace(structure, form="tree")
    weight = random_weight(structure, dtype)
    fit = tree_svd(weight, structure, Truncation(structure.full_bond))
    assert isinstance(fit.form, Tree)
    assert fit.form.bonds == structure.bonds(structure.full_bond) or any(structure.padding)
    assert max(relative_error(weight, fit), fit.relative_error) < limit
    assert torch.equal(weight, random_weight(structure, dtype))


def test_two_sites_match_a_chain() -> None:
    structure = make_structure("linear", (24, 36), sites=2)
    weight = random_weight(structure)
    chain = tt_svd(weight, structure, Truncation(5))
    tree = tree_svd(weight, replace(structure, form="tree"), Truncation(5))
    assert tree.form.num_parameters == chain.form.num_parameters
    torch.testing.assert_close(tree.form.to_weight(), chain.form.to_weight())


@SOME
@given(
    TREES,
    BONDS,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([None, torch.float32, torch.float16]),
)
def test_reported_error_matches_the_stored_cores(
    structure: Structure, bond: int, dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    weight = random_weight(structure, dtype)
    fit = tree_svd(weight, structure, Truncation(bond), Target(stored))
    assert {core.dtype for core in fit.form.cores} == {stored or dtype}
    assert all(have <= cap for have, cap in zip(fit.form.bonds, structure.bonds(bond), strict=True))
    arithmetic = 1e-12 if dtype == torch.float64 else 3e-6
    assert fit.relative_error == pytest.approx(relative_error(weight, fit), rel=1e-4, abs=arithmetic)


@SOME
@given(TREES, st.sampled_from([0.03, 0.2, 0.6]), st.sampled_from([torch.float32, torch.float64]))
def test_respects_the_tolerance(structure: Structure, tolerance: float, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    fit = tree_svd(weight, structure, Truncation(structure.full_bond, tolerance=tolerance))
    assert relative_error(weight, fit) <= tolerance * (1 + 1e-5)


def test_tolerance_recovers_bonds_under_noise() -> None:
    structure = make_structure("linear", (64, 64), sites=3, form="tree")
    signal = deinterleave(torch.ones(structure.site_sizes, dtype=torch.float64), structure)
    weight = signal + 0.01 * random_weight(structure)
    assert tree_svd(weight, structure, Truncation(256, tolerance=0.05)).form.bonds == (1, 1, 1)
    assert tree_svd(weight, structure, Truncation(256, tolerance=1e-4)).form.bonds == (16, 16, 16)


@SOME
@given(TREES, BONDS, st.sampled_from([torch.float32, torch.float64]))
def test_entropies_match_direct_svds(structure: Structure, bond: int, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    tensor = interleave(weight.double(), structure).numpy()
    fit = tree_svd(weight, structure, Truncation(bond))
    spans = branches(tensor.ndim)
    assert len(fit.entropies_of_weight) == len(fit.routes) == len(fit.entropies) == len(spans)
    for known, route, span in zip(fit.entropies_of_weight, fit.routes, spans, strict=True):
        if known is not None:
            values = np.linalg.svd(unfolding(tensor, span), compute_uv=False)
            p = values[values > 0] ** 2 / (values**2).sum()
            assert route == "exact"
            assert known == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (1, 7), (101, 8)])
def test_zero_weight_gives_zero_cores(shape: tuple[int, int]) -> None:
    structure = make_structure("embedding", shape, form="tree")
    fit = tree_svd(torch.zeros(shape), structure, Truncation(24))
    assert set(fit.form.bonds) <= {1} and fit.relative_error == 0.0
    assert torch.equal(fit.form.to_weight(), torch.zeros(shape))


def test_is_deterministic() -> None:
    structure = make_structure("linear", (1024, 784), sites=2, form="tree")
    weight = random_weight(structure, torch.float32)
    cut, seeds = Truncation(16), (5, 5, 6)
    first, second, other = (tree_svd(weight, structure, cut, Target(seed=seed)) for seed in seeds)
    assert first.routes == ["krylov"]
    assert all(map(torch.equal, first.form.cores, second.form.cores))
    assert not all(map(torch.equal, first.form.cores, other.form.cores))
