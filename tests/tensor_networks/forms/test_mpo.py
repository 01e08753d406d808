"""The MPO against Eq. (5) spelt out, its gauge, spectra and counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.forms.mpo import MPO, entropy
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import EVERY_KIND, by_eq_5, random_cores, shape_id, structures

SOME = settings(max_examples=40, deadline=None, derandomize=True)
BONDS = st.integers(1, 6)


def random_mpo(structure: Structure, bond: int, seed: int = 0) -> MPO:
    return MPO(random_cores(structure, bond, seed), structure)


def parts(cores: list[Tensor], bond: int) -> tuple[np.ndarray, np.ndarray]:
    """All cores left of ``bond`` as (rows, D), all right of it as (D, columns)."""
    left, right = np.ones((1, 1)), np.ones((1, 1))
    for core in cores[:bond]:
        left = np.einsum("pa,ajib->pjib", left, core.double().numpy()).reshape(-1, core.shape[3])
    for core in reversed(cores[bond:]):
        right = np.einsum("ajib,bq->ajiq", core.double().numpy(), right).reshape(core.shape[0], -1)
    return left, right


def schmidt_values(mpo: MPO, bond: int) -> np.ndarray:
    """From the dense tensor, by numpy: the independent reference."""
    left, right = parts(mpo.cores, len(mpo.cores))
    tensor = (left @ right).reshape(math.prod(mpo.structure.site_sizes[:bond]), -1)
    return np.linalg.svd(tensor, compute_uv=False)


@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_to_weight_matches_eq_5(structure: Structure) -> None:
    mpo = random_mpo(structure, 3)
    expected = by_eq_5(mpo.cores, structure)
    torch.testing.assert_close(mpo.to_weight(), expected, rtol=1e-12, atol=1e-12)


def test_to_weight_keeps_the_dtype() -> None:
    structure = make_structure("linear", (12, 8))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mpo = MPO([core.to(dtype) for core in random_cores(structure, 2)], structure)
        assert mpo.to_weight().dtype == dtype


@SOME
@given(structures(), BONDS)
def test_halves_multiply_to_the_interleaved_tensor(structure: Structure, bond: int) -> None:
    mpo = random_mpo(structure, bond)
    left, right = mpo.halves()
    whole = parts(mpo.cores, len(mpo.cores))[0]
    np.testing.assert_allclose((left @ right).numpy().reshape(whole.shape), whole, rtol=1e-10, atol=1e-10)


@SOME
@given(structures(), BONDS)
def test_halves_are_cut_at_the_smallest_size(structure: Structure, bond: int) -> None:
    mpo = random_mpo(structure, bond)
    left, right = mpo.halves()
    cuts = [parts(mpo.cores, k) for k in range(1, len(mpo.cores))] or [parts(mpo.cores, 0)]
    assert left.numel() + right.numel() == min(a.size + b.size for a, b in cuts)


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [((2, 2, 2, 16), ((64, 3), (3, 256))), ((16, 2, 2, 2), ((256, 3), (3, 64)))],
)
def test_halves_may_be_cut_at_the_ends(
    inputs: tuple[int, ...], shapes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    structure = make_structure("linear", (128, 128), factors=(inputs, inputs))
    left, right = random_mpo(structure, 3).halves()
    assert (tuple(left.shape), tuple(right.shape)) == shapes


@SOME
@given(structures(), BONDS)
def test_bonds_and_parameters_match_the_cores(structure: Structure, bond: int) -> None:
    mpo = random_mpo(structure, bond)
    assert mpo.bonds == structure.bonds(bond)
    assert mpo.num_parameters == sum(core.numel() for core in mpo.cores) == structure.num_parameters(bond)


@SOME
@given(structures(), BONDS, st.integers(0, 9))
def test_balanced_keeps_the_weight_with_equal_grams(structure: Structure, bond: int, seed: int) -> None:
    mpo = random_mpo(structure, bond, seed)
    balanced, spectra = mpo.balanced()
    torch.testing.assert_close(balanced.to_weight(), mpo.to_weight(), rtol=1e-9, atol=1e-9)
    for k, found in enumerate(spectra, start=1):
        left, right = parts(balanced.cores, k)
        rank = balanced.bonds[k]
        values = schmidt_values(mpo, k)
        gram = np.diag(values[:rank])
        scale = 1e-9 * max(values[0], 1.0)
        np.testing.assert_allclose(left.T @ left, gram, atol=scale)
        np.testing.assert_allclose(right @ right.T, gram, atol=scale)
        assert values[rank:].max(initial=0.0) < scale
        np.testing.assert_allclose(found.numpy(), values[:rank], atol=scale)


@SOME
@given(structures(), BONDS)
def test_spectra_and_entropies_match_each_bipartition(structure: Structure, bond: int) -> None:
    mpo = random_mpo(structure, bond)
    spectra, entropies = mpo.spectra(), mpo.entropies()
    assert len(spectra) == len(entropies) == len(mpo.cores) - 1
    for k, (values, found) in enumerate(zip(spectra, entropies, strict=True), start=1):
        direct = schmidt_values(mpo, k)
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), direct[: len(values)], rtol=1e-8, atol=1e-9 * direct[0])
        p = direct**2 / (direct**2).sum()
        p = p[p > 1e-28]
        assert found == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)


def test_balanced_does_not_change_its_input() -> None:
    mpo = random_mpo(make_structure("linear", (12, 8)), 3)
    before = [core.clone() for core in mpo.cores]
    mpo.balanced()
    assert all(torch.equal(a, b) for a, b in zip(before, mpo.cores, strict=True))


def test_balanced_cuts_empty_bonds() -> None:
    structure = make_structure("linear", (16, 16), sites=2)
    core = torch.randn(1, 4, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twice = [torch.cat([core, core], 3), torch.cat([core, core], 0)]
    mpo = MPO(twice, structure)
    balanced, _ = mpo.balanced()
    assert balanced.bonds == (1, 1, 1)
    torch.testing.assert_close(balanced.to_weight(), mpo.to_weight())


def test_balanced_zero_weight_gives_zero_cores() -> None:
    structure = make_structure("linear", (16, 16), sites=3)
    zero, _ = MPO([torch.zeros_like(core) for core in random_cores(structure, 3)], structure).balanced()
    assert zero.bonds == (1, 1, 1, 1)
    assert all(bool((core == 0).all()) for core in zero.cores)
    assert zero.entropies() == [0.0, 0.0]


def test_entropy_of_equal_values_is_the_log_of_their_number() -> None:
    assert entropy(torch.full((7,), 3.0)) == pytest.approx(math.log(7))
    assert entropy(torch.tensor([2.0, 0.0])) == 0.0
    assert entropy(torch.zeros(3)) == 0.0


def test_entropy_takes_squares_for_probabilities() -> None:
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert entropy(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(1, 2, 3, 2), (3, 2, 3, 1)], "bonds do not meet"),
        ([(2, 2, 3, 2), (2, 2, 3, 1)], "bonds do not meet"),
        ([(1, 2, 3, 2), (2, 2, 3, 2)], "bonds do not meet"),
        ([(1, 3, 2, 2), (2, 2, 3, 1)], r"sites \(J, I\) are \[\(2, 3\), \(2, 3\)\]"),
        ([(1, 2, 3, 1)], "sites"),
    ],
)
def test_rejects_cores_that_do_not_fit(shapes: list[tuple[int, ...]], said: str) -> None:
    structure = make_structure("linear", (4, 9), factors=((2, 2), (3, 3)))
    with pytest.raises(ValueError, match=said):
        MPO([torch.zeros(shape) for shape in shapes], structure)


def test_balanced_is_idempotent() -> None:
    mpo = random_mpo(make_structure("conv2d", (8, 6, 3, 3)), 4)
    (first, _), (second, _) = mpo.balanced(), mpo.balanced()
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
