from __future__ import annotations

import numpy as np
import pytest
import torch

from mpoc.reproduce.image_states import (
    contract_stack,
    cosine_errors,
    entropies,
    low_rank_errors,
    tt_svd_stack,
)
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.mpo import entropy
from mpoc.tensor_networks.structure import Structure

SITES = (3, 4, 4, 4)


def stack(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SITES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bond", [1, 2, 5, 7])
def test_batched_states_match_single_tt_svds(bond: int) -> None:
    x = stack()
    cores = tt_svd_stack(x, bond)
    errors = (contract_stack(cores) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    structure = Structure("linear", (1, 192), False, (1,) * 4, SITES)
    for k, tensor in enumerate(x):
        fit = tt_svd(tensor.reshape(1, -1), structure, Truncation(bond))
        assert [core.shape[1] for core in cores] == list(fit.form.bonds[:-1])
        assert float(errors[k]) == pytest.approx(fit.relative_error, rel=1e-9)


def test_full_bond_is_exact() -> None:
    x = stack()
    cores = tt_svd_stack(x, 100)
    assert [tuple(core.shape[1:]) for core in cores] == [(1, 3, 3), (3, 4, 12), (12, 4, 4), (4, 4, 1)]
    torch.testing.assert_close(contract_stack(cores), x)


def test_entropies_match_direct_svds() -> None:
    x = stack()
    x[3] = 0
    found = entropies(x)
    for tensor, values in zip(x, found, strict=True):
        for k, rows in enumerate((3, 12, 48)):
            direct = torch.from_numpy(np.linalg.svd(tensor.reshape(rows, -1).numpy(), compute_uv=False))
            assert float(values[k]) == pytest.approx(entropy(direct), abs=1e-9)


def test_product_states_have_no_entanglement() -> None:
    vectors = [torch.rand(2, size, dtype=torch.float64) for size in SITES]
    x = torch.einsum("na,nb,nc,nd->nabcd", *vectors)
    assert float(entropies(x).abs().max()) < 1e-9
    torch.testing.assert_close(contract_stack(tt_svd_stack(x, 1)), x)


def test_low_rank_errors_match_svd() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = low_rank_errors(x)
    assert found.shape == (2, 6)
    left, values, right = np.linalg.svd(x[1].reshape(12, 5).numpy(), full_matrices=False)
    for rank in range(6):
        near = (left[:, :rank] * values[:rank]) @ right[:rank]
        error = np.square(near - x[1].reshape(12, 5).numpy()).sum()
        assert float(found[1, rank]) == pytest.approx(error, abs=1e-9)


def test_cosine_errors_match_dct() -> None:
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    own, common = cosine_errors(x)
    coefficients = fft.dctn(x.numpy(), axes=(1, 2, 3), norm="ortho").reshape(5, -1)
    places = np.argsort(-np.square(coefficients).mean(0))
    for k in (0, 1, 10, 72):
        for image in range(5):
            kept = coefficients[image].copy()
            kept[np.argsort(-np.abs(kept))[:k]] = 0
            assert float(own[image, k]) == pytest.approx(np.square(kept).sum(), abs=1e-9)
            rest = coefficients[image, places[k:]]
            assert float(common[image, k]) == pytest.approx(np.square(rest).sum(), abs=1e-9)
