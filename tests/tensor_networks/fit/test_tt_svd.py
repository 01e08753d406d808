"""TT-SVD against successive numpy SVDs, and the error that it reports."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import deinterleave, interleave
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import EVERY_KIND, random_cores, random_weight, shape_id, structures
from tests.tensor_networks.fit.discarded import fit_and_discarded

SOME = settings(max_examples=40, deadline=None, derandomize=True)
BONDS = st.integers(1, 8)


def relative_error(weight: Tensor, form: Form) -> float:
    """Of the stored cores, all in float64."""
    cores = [core.double() for core in form.cores]
    difference = MPO(cores, form.structure).to_weight() - weight.double()
    return float(difference.norm() / weight.double().norm())


def discarded_by_numpy(tensor: np.ndarray, max_bond: int) -> list[float]:
    """Oseledets 2011, algorithm 1: the squares that each successive SVD throws away."""
    sizes, lost, bond = tensor.shape, [], 1
    rest = tensor.reshape(sizes[0], -1)
    for size in sizes[:-1]:
        _, values, right = np.linalg.svd(rest.reshape(bond * size, -1), full_matrices=False)
        bond = min(max_bond, len(values))
        lost.append(float((values[bond:] ** 2).sum()))
        rest = values[:bond, None] * right[:bond]
    return lost


def unfolding_values(tensor: np.ndarray) -> list[np.ndarray]:
    lefts = [math.prod(tensor.shape[:k]) for k in range(1, tensor.ndim)]
    return [np.linalg.svd(tensor.reshape(left, -1), compute_uv=False) for left in lefts]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_full_bond_is_exact(structure: Structure, dtype: torch.dtype, limit: float) -> None:
    weight = random_weight(structure, dtype)
    fit = tt_svd(weight, structure, Truncation(structure.full_bond))
    assert relative_error(weight, fit.form) < limit
    assert fit.relative_error < limit
    assert fit.form.to_weight().shape == weight.shape


@SOME
@given(structures(), BONDS)
def test_squared_error_is_the_sum_of_discarded_squares(structure: Structure, bond: int) -> None:
    weight = random_weight(structure)
    tensor = interleave(weight, structure)
    fit, lost = fit_and_discarded(tt_svd, weight, structure, bond)
    norm = float(weight.norm()) ** 2
    assert lost == pytest.approx(sum(discarded_by_numpy(tensor.numpy(), bond)), rel=1e-9, abs=1e-12 * norm)
    tails = sum(float((values[bond:] ** 2).sum()) for values in unfolding_values(tensor.numpy()))
    assert lost <= tails * (1 + 1e-9) + 1e-12 * norm
    if not any(structure.padding):
        assert fit.relative_error**2 * norm == pytest.approx(lost, rel=1e-9, abs=1e-12 * norm)
    else:  # errors in the padding are not counted
        assert fit.relative_error**2 * norm <= lost * (1 + 1e-9) + 1e-12 * norm


@SOME
@given(
    structures(),
    BONDS,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
)
def test_reported_error_matches_the_stored_cores(
    structure: Structure, bond: int, dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    weight = random_weight(structure, dtype)
    fit = tt_svd(weight, structure, Truncation(bond), Target(stored))
    assert {core.dtype for core in fit.form.cores} == {stored or dtype}
    assert max(fit.form.bonds) <= bond
    arithmetic = 1e-12 if dtype == torch.float64 else 3e-6
    expected = relative_error(weight, fit.form)
    assert fit.relative_error == pytest.approx(expected, rel=1e-4, abs=arithmetic)


def test_error_includes_rounding_to_the_stored_dtype() -> None:
    structure = make_structure("linear", (64, 48))
    weight = random_weight(structure, torch.float32)
    exact, rounded = (tt_svd(weight, structure, Truncation(10**6), Target(d)) for d in (None, torch.bfloat16))
    assert exact.relative_error < 1e-5 < 1e-3 < rounded.relative_error < 1e-2


@SOME
@given(structures(), BONDS)
def test_stored_cores_are_balanced(structure: Structure, bond: int) -> None:
    fit = tt_svd(random_weight(structure), structure, Truncation(bond))
    cores = [core.numpy() for core in fit.form.cores]
    left, lefts = np.ones((1, 1)), []
    for core in cores[:-1]:
        left = np.einsum("pa,ajib->pjib", left, core).reshape(-1, core.shape[3])
        lefts.append(left)
    right = np.ones((1, 1))
    for k in range(len(cores) - 1, 0, -1):
        right = np.einsum("ajib,bq->ajiq", cores[k], right).reshape(cores[k].shape[0], -1)
        values = np.linalg.svd(lefts[k - 1] @ right, compute_uv=False)
        schmidt = np.diag(values[: len(right)])
        np.testing.assert_allclose(lefts[k - 1].T @ lefts[k - 1], schmidt, atol=1e-9 * values[0])
        np.testing.assert_allclose(right @ right.T, schmidt, atol=1e-9 * values[0])
        p = values[: len(right)] ** 2 / (values**2).sum()
        assert fit.entropies[k - 1] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)


@SOME
@given(structures(), BONDS, st.sampled_from([torch.float32, torch.float64]))
def test_entropies_match_the_unfoldings(structure: Structure, bond: int, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    fit = tt_svd(weight, structure, Truncation(bond))
    direct = unfolding_values(interleave(weight.double(), structure).numpy())
    assert len(fit.entropies_of_weight) == len(fit.routes) == len(fit.entropies) == len(direct)
    for known, route, values in zip(fit.entropies_of_weight, fit.routes, direct, strict=True):
        if known is not None:
            p = values[values > 0] ** 2 / (values**2).sum()
            assert route == "exact"
            assert known == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)


@SOME
@given(structures(), BONDS, st.sampled_from([torch.float32, torch.float64]))
def test_first_spectrum_matches_its_unfolding(structure: Structure, bond: int, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    fit = tt_svd(weight, structure, Truncation(bond))
    direct = unfolding_values(interleave(weight.double(), structure).numpy())
    known = [(k, values) for k, values in enumerate(fit.spectra_of_weight) if values is not None]
    assert len(known) <= 1
    for k, values in known:
        assert fit.entropies_of_weight[k] is not None
        assert len(values) == len(direct[k]) > fit.form.bonds[k + 1]
        np.testing.assert_allclose(values, direct[k], atol=1e-3 * direct[k][0])


def test_records_no_spectrum_without_a_cut() -> None:
    structure = make_structure("linear", (16, 16), sites=3)
    fit = tt_svd(random_weight(structure), structure, Truncation(structure.full_bond))
    assert fit.spectra_of_weight == [None] * 2


def test_first_truncated_bond_has_the_entropy_of_the_weight() -> None:
    structure = make_structure("linear", (64, 64), factors=((2, 4, 4, 2), (4, 2, 2, 4)))
    fit = tt_svd(random_weight(structure), structure, Truncation(16))
    assert fit.routes == ["kept", "exact", "kept"]
    assert [known is None for known in fit.entropies_of_weight] == [True, False, True]


@SOME
@given(structures(), st.sampled_from([0.03, 0.2, 0.6]), st.sampled_from([torch.float32, torch.float64]))
def test_respects_the_tolerance(structure: Structure, tolerance: float, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    fit = tt_svd(weight, structure, Truncation(structure.full_bond, tolerance=tolerance))
    assert relative_error(weight, fit.form) <= tolerance * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_recovers_the_bond_under_noise(dtype: torch.dtype) -> None:
    structure = make_structure("linear", (64, 64), sites=3)
    signal = MPO([torch.ones(a, 4, 4, b, dtype=dtype) for a, b in ((1, 1), (1, 1), (1, 1))], structure)
    noise = 0.01 * random_weight(structure, dtype)
    weight = signal.to_weight() + noise
    for tolerance, bonds in ((0.05, (1, 1, 1, 1)), (1e-4, (1, 16, 16, 1))):
        assert tt_svd(weight, structure, Truncation(256, tolerance)).form.bonds == bonds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kronecker_product_needs_bond_one(dtype: torch.dtype) -> None:
    structure = make_structure("linear", (24, 30), factors=((2, 3, 4), (3, 5, 2)))
    generator = torch.Generator().manual_seed(0)
    first, *others = (torch.randn(s, generator=generator, dtype=dtype) for s in ((2, 3), (3, 5), (4, 2)))
    weight = torch.kron(torch.kron(first, others[0]), others[1])
    fit = tt_svd(weight, structure, Truncation(1))
    assert fit.relative_error < 1e-6
    assert fit.entropies == pytest.approx([0.0, 0.0], abs=1e-9)


def test_cuts_bonds_of_rounding_noise() -> None:
    structure = make_structure("linear", (512, 512), sites=3)
    weight = MPO(random_cores(structure, 3), structure).to_weight().float()
    fit = tt_svd(weight, structure, Truncation(64))
    assert 3 <= min(fit.form.bonds[1:-1]) <= max(fit.form.bonds) < 10
    assert fit.relative_error < 1e-6


@pytest.mark.parametrize("shape", [(16, 16), (1, 7), (7, 1), (101, 8), (1024, 1024)])
def test_zero_weight_gives_zero_cores(shape: tuple[int, int]) -> None:
    structure = make_structure("embedding", shape)
    fit = tt_svd(torch.zeros(shape), structure, Truncation(24))
    assert set(fit.form.bonds) == {1}
    assert fit.relative_error == 0.0
    assert torch.equal(fit.form.to_weight(), torch.zeros(shape))


def test_large_sides_use_krylov_and_stay_optimal() -> None:
    structure = make_structure("linear", (576, 576), sites=2)
    weight = random_weight(structure, torch.float32)
    fit = tt_svd(weight, structure, Truncation(16))
    assert fit.routes == ["krylov"]
    lost = discarded_by_numpy(interleave(weight, structure).double().numpy(), 16)[0]
    assert fit.relative_error <= 1.001 * math.sqrt(lost) / float(weight.double().norm())


def test_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    structure = make_structure("linear", (576, 576), sites=2)
    weight = random_weight(structure, torch.float32)
    first = tt_svd(weight, structure, Truncation(8), Target(seed=5))
    state = torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    second = tt_svd(weight, structure, Truncation(8), Target(seed=5))
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)
    other = tt_svd(weight, structure, Truncation(8), Target(seed=6))
    assert all(map(torch.equal, first.form.cores, second.form.cores))
    assert not all(map(torch.equal, first.form.cores, other.form.cores))


def test_weight_is_unchanged() -> None:
    for structure in EVERY_KIND:
        weight = random_weight(structure)
        tt_svd(weight, structure, Truncation(3))
        assert torch.equal(weight, random_weight(structure))


def bonds_by_numpy(tensor: np.ndarray, discard: float, cap: int) -> list[int]:
    """Of successive SVDs, at each the smallest rank whose squares beyond it are at most that share."""
    sizes, bonds, bond = tensor.shape, [1], 1
    rest = tensor
    for size in sizes[:-1]:
        _, values, right = np.linalg.svd(rest.reshape(bond * size, -1), full_matrices=False)
        lost = [float((values[rank:] ** 2).sum()) for rank in range(len(values) + 1)]
        bond = next(rank for rank in range(1, len(lost)) if lost[rank] <= discard * lost[0] or rank == cap)
        bonds.append(bond)
        rest = values[:bond, None] * right[:bond]
    return [*bonds, 1]


@SOME
@given(structures(), st.floats(0.003, 0.9), st.sampled_from([3, 10**6]))
def test_discard_determines_each_bond(structure: Structure, discard: float, cap: int) -> None:
    weight = random_weight(structure)
    fit = tt_svd(weight, structure, Truncation(min(cap, structure.full_bond), discard=discard))
    assert fit.form.bonds == tuple(bonds_by_numpy(interleave(weight, structure).numpy(), discard, cap))
    if cap > structure.full_bond:
        cuts = len(structure.site_sizes) - 1
        assert fit.relative_error**2 <= 1 - (1 - discard) ** cuts + 1e-12


def test_bonds_end_at_a_drop_of_the_spectrum() -> None:
    """A weight of low rank at one bond, full at the others, and a small tail that may be discarded."""
    structure = make_structure("linear", (64, 64), factors=((4, 4, 4), (4, 4, 4)))
    torch.manual_seed(0)
    left, right = torch.randn(16, 2), torch.randn(2, 256)
    noise = torch.randn(16, 256)
    tensor = left @ right / (left @ right).norm() + 1e-3 * noise / noise.norm()
    whole = deinterleave(tensor.reshape(16, 16, 16), structure)
    assert tt_svd(whole, structure, Truncation(16, discard=1e-5)).form.bonds == (1, 2, 16, 1)
    assert tt_svd(whole, structure, Truncation(16, discard=1e-8)).form.bonds == (1, 16, 16, 1)


def test_zero_weight_needs_bond_one() -> None:
    structure = make_structure("linear", (16, 16), sites=3)
    fit = tt_svd(torch.zeros(16, 16), structure, Truncation(structure.full_bond, discard=0.1))
    assert fit.form.bonds == (1,) * (len(structure.site_sizes) + 1)
    assert fit.relative_error == 0.0
