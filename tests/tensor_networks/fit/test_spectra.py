"""Spectra, entropies and effective bonds against the SVD of each bipartition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.fit.spectra import Cut, cuts_of_cores, cuts_of_weight, schmidt_spectra
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave, interleave
from mpoc.tensor_networks.geometry import make_geometry
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure
from tests.support.weights import EVERY_KIND, random_cores, random_weight, shape_id, structures

SOME = settings(max_examples=40, deadline=None, derandomize=True)
SQUARE = make_structure("linear", (64, 64), factors=((4, 4, 4), (4, 4, 4)))


def by_svd(weight: Tensor, structure: Structure) -> list[Tensor]:
    """Singular values of each bipartition, by torch's SVD of the whole unfolding in float64."""
    tensor = interleave(weight.double(), structure)
    sizes = structure.site_sizes
    return [torch.linalg.svdvals(tensor.reshape(math.prod(sizes[:k]), -1)) for k in range(1, len(sizes))]


def entropy_of(values: Tensor) -> float:
    p = values.square() / values.square().sum()
    return float(-torch.special.xlogy(p, p).sum())


def check(cuts: list[Cut], weight: Tensor, structure: Structure, kept: float) -> None:
    expected = by_svd(weight, structure)
    assert len(cuts) == len(expected)
    for site, (cut, values) in enumerate(zip(cuts, expected, strict=True), start=1):
        assert (cut.site, cut.full_bond) == (site, len(values))
        assert cut.entropy == pytest.approx(entropy_of(values), abs=1e-6)
        assert cut.largest_entropy == pytest.approx(math.log(len(values)))
        normalised = values / values.norm()
        spectrum = torch.tensor(cut.spectrum, dtype=torch.float64)
        torch.testing.assert_close(spectrum, normalised[: len(spectrum)], rtol=0, atol=1e-7)
        shares = normalised.square().cumsum(0)
        assert cut.effective_bond == 1 + int((shares < kept - 1e-12).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_matches_direct_svd_of_a_random_weight(structure: Structure, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    check(cuts_of_weight(weight, structure, 0.9), weight, structure, 0.9)


@SOME
@given(structures(), st.floats(0.3, 0.999))
def test_matches_direct_svd_of_any_structure(structure: Structure, kept: float) -> None:
    weight = random_weight(structure, seed=1)
    check(cuts_of_weight(weight, structure, kept), weight, structure, kept)


def test_low_rank_weight_has_few_values() -> None:
    weight = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, 64, dtype=torch.float64)
    check(cuts_of_weight(weight, SQUARE, 0.99), weight, SQUARE, 0.99)
    (cut,) = cuts_of_weight(weight, low_rank_structure("linear", (64, 64)), 1 - 1e-12)
    assert cut.full_bond == 64 and cut.effective_bond == 3
    assert cut.entropy <= math.log(3)


def test_product_has_no_entanglement() -> None:
    a, b, c = (torch.randn(16, dtype=torch.float64) for _ in range(3))
    weight = deinterleave(torch.einsum("a,b,c->abc", a, b, c), SQUARE)
    for cut in cuts_of_weight(weight, SQUARE, 0.999999):
        assert cut.entropy == pytest.approx(0, abs=1e-6)
        assert cut.effective_bond == 1


def test_maximally_entangled_weight_has_maximal_entropy() -> None:
    """The identity between the first site and the rest: a flat spectrum."""
    tensor = torch.eye(16).reshape(16, 16, 1) * torch.randn(16)
    first, _ = cuts_of_weight(deinterleave(tensor, SQUARE), SQUARE, 0.99)
    assert first.entropy == pytest.approx(first.largest_entropy, abs=1e-6)
    assert first.effective_bond == 16


def test_zero_weight_has_zero_entropy() -> None:
    for cut in cuts_of_weight(torch.zeros(64, 64), SQUARE, 0.99):
        assert (cut.entropy, cut.effective_bond, set(cut.spectrum)) == (0.0, 1, {0.0})


# A chain's own spectra count what it holds in the padding.
UNPADDED = [structure for structure in EVERY_KIND if not any(structure.padding)]


@pytest.mark.parametrize("structure", UNPADDED, ids=shape_id)
def test_cores_have_the_spectra_of_their_weight(structure: Structure) -> None:
    cores = random_cores(structure, 3)
    check(cuts_of_cores(cores, structure, 0.9), form_of(cores, structure).to_weight(), structure, 0.9)


def test_sum_has_the_spectra_of_its_weight() -> None:
    cores = [*random_cores(SQUARE, 2), torch.randn(1, 64, 1, 3), torch.randn(3, 1, 64, 1)]
    cores = [core.double() for core in cores]
    both = SQUARE.as_form("svd+mpo")
    check(cuts_of_cores(cores, both, 0.9), form_of(cores, both).to_weight(), SQUARE, 0.9)


@pytest.mark.parametrize("form_name", ["tree", "mera"])
def test_trees_and_meras_have_the_spectra_of_their_weight(form_name: str) -> None:
    structure = make_structure("linear", (64, 64), factors=((4,) * 3, (4,) * 3), form=form_name)
    torch.manual_seed(0)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in structure.core_shapes(structure.bonds(3))]
    check(cuts_of_cores(cores, structure, 0.9), form_of(cores, structure).to_weight(), SQUARE, 0.9)


def test_truncation_lowers_the_entropy() -> None:
    weight = random_weight(SQUARE)
    before = cuts_of_weight(weight, SQUARE, 0.99)
    after = cuts_of_cores(tt_svd(weight, SQUARE, Truncation(5)).form.cores, SQUARE, 0.99)
    for full, cut in zip(before, after, strict=True):
        assert cut.entropy <= math.log(5) < full.entropy


def test_large_map_has_the_spectra_of_the_dense_map(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = make_geometry((4, 4, 3, 3), (8, 8))
    structure = make_structure("convmap", (4, 4, 3, 3), geometry=geometry)
    kernel = torch.randn(4, 4, 3, 3)
    dense = schmidt_spectra(kernel, structure)
    monkeypatch.setattr("mpoc.tensor_networks.structure.DENSE_LIMIT", 0)
    for values, exact in zip(dense, schmidt_spectra(kernel, structure), strict=True):
        torch.testing.assert_close(values[: len(exact)], exact, rtol=1e-5, atol=1e-5)
        assert entropy_of(values) == pytest.approx(entropy_of(exact), abs=1e-6)
