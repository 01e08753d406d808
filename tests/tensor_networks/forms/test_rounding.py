"""TT-rounding against numpy's SVDs, its error bound, and the rank within a tolerance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.forms.mpo import MPO, add, rank_within, subtract
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import random_cores, structures

SOME = settings(max_examples=40, deadline=None, derandomize=True)
BONDS = st.integers(1, 5)


def random_mpo(structure: Structure, bond: int, seed: int = 0) -> MPO:
    return MPO(random_cores(structure, bond, seed), structure)


def dense(mpo: MPO) -> np.ndarray:
    """The interleaved tensor (J_1 I_1, J_2 I_2, …), by numpy."""
    whole = np.ones((1, 1))
    for core in mpo.cores:
        whole = np.einsum("pa,ajib->pjib", whole, core.double().numpy()).reshape(-1, core.shape[3])
    return whole.reshape(mpo.structure.site_sizes)


def tails(mpo: MPO, bond: int) -> list[float]:
    """At each cut, the squares that rank ``bond`` must lose."""
    whole, sizes = dense(mpo), mpo.structure.site_sizes
    values = [
        np.linalg.svd(whole.reshape(math.prod(sizes[:k]), -1), compute_uv=False) for k in range(1, len(sizes))
    ]
    return [float((v[bond:] ** 2).sum()) for v in values]


@pytest.mark.slow
@SOME
@given(structures(), BONDS)
def test_norm_matches_the_tensor(structure: Structure, bond: int) -> None:
    mpo = random_mpo(structure, bond)
    assert mpo.norm() == pytest.approx(float(np.linalg.norm(dense(mpo))), rel=1e-10)


@pytest.mark.slow
@SOME
@given(structures(), BONDS, BONDS)
def test_cap_gives_an_error_between_worst_cut_and_sum(structure: Structure, bond: int, cap: int) -> None:
    mpo = random_mpo(structure, bond)
    rounded, spectra = mpo.rounded(cap)
    assert max(rounded.bonds) <= cap
    lost = float(((dense(mpo) - dense(rounded)) ** 2).sum())
    least = tails(mpo, cap)
    slack = 1e-9 * mpo.norm() ** 2
    assert max(least, default=0.0) - slack <= lost <= sum(least) + slack
    for values, again in zip(spectra, rounded.spectra(), strict=True):
        torch.testing.assert_close(values, again, rtol=1e-7, atol=1e-9 * mpo.norm())


@pytest.mark.slow
@SOME
@given(structures(), BONDS, st.floats(0.01, 0.9))
def test_respects_the_tolerance(structure: Structure, bond: int, tolerance: float) -> None:
    mpo = random_mpo(structure, bond)
    rounded, _ = mpo.rounded(structure.full_bond, tolerance)
    assert np.linalg.norm(dense(mpo) - dense(rounded)) <= tolerance * mpo.norm() * (1 + 1e-9)


@pytest.mark.slow
@SOME
@given(structures(), BONDS, st.floats(0.003, 0.9))
def test_discard_determines_each_bond(structure: Structure, bond: int, discard: float) -> None:
    """At the first cut, from the right, as the SVD of that unfolding says; at the others within the bound."""
    mpo = random_mpo(structure, bond)
    rounded, _ = mpo.rounded(structure.full_bond, discard=discard)
    sizes = structure.site_sizes
    if len(sizes) > 1:
        values = np.linalg.svd(dense(mpo).reshape(-1, sizes[-1]), compute_uv=False) ** 2
        lost = [float(values[rank:].sum()) / float(values.sum()) for rank in range(len(values) + 1)]
        assert rounded.bonds[-2] == next(rank for rank in range(1, len(lost)) if lost[rank] <= discard)
    error = float(((dense(mpo) - dense(rounded)) ** 2).sum()) / mpo.norm() ** 2
    assert error <= 1 - (1 - discard) ** (len(sizes) - 1) + 1e-12


def test_tolerance_reduces_bonds_and_is_used_up() -> None:
    structure = make_structure("linear", (64, 64), sites=3)
    signal, noise = random_mpo(structure, 2), random_mpo(structure, 8, seed=1)
    noise.cores[0] *= 1e-3 * signal.norm() / noise.norm()
    assert add(signal, noise).rounded(99, 2e-3)[0].bonds == (1, 2, 2, 1)
    assert max(add(signal, noise).rounded(99, 1e-5)[0].bonds) > 8


def test_rounding_recovers_bonds_of_a_doubled_weight() -> None:
    mpo = random_mpo(make_structure("conv2d", (8, 6, 3, 3)), 3)
    doubled = add(mpo, mpo)
    assert max(doubled.bonds) == 6
    rounded, _ = doubled.rounded(99, 1e-12)
    assert rounded.bonds == mpo.bonds
    torch.testing.assert_close(rounded.to_weight(), 2 * mpo.to_weight())


def test_gauge_is_balanced() -> None:
    rounded, spectra = random_mpo(make_structure("linear", (27, 64), sites=3), 6).rounded(4)
    left = rounded.cores[0].flatten(0, 2)
    torch.testing.assert_close(left.T @ left, torch.diag(spectra[0]))


def test_differences_resolve_small_norms() -> None:
    mpo = random_mpo(make_structure("linear", (64, 64), sites=3), 4)
    near = MPO([mpo.cores[0] * (1 + 1e-10), *mpo.cores[1:]], mpo.structure)
    assert subtract(near, mpo).norm() / mpo.norm() == pytest.approx(1e-10, rel=1e-3)


@pytest.mark.parametrize(
    ("cap", "discard", "expected"),
    [(9, 0.0, (3, 0.0)), (2, 0.0, (2, 1.0)), (9, 1.0, (2, 1.0)), (9, 4.9, (2, 1.0)), (9, 99.0, (1, 5.0))],
)
def test_finds_the_rank_within_a_discard(cap: int, discard: float, expected: tuple[int, float]) -> None:
    assert rank_within(torch.tensor([3.0, 2.0, 1.0, 0.0]), cap, discard) == expected
