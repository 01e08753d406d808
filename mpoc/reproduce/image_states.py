"""A stack of tensors as matrix product states, all at once, and what else the same numbers could hold.

A state of sites d_1, …, d_m has cores (D_{k-1}, d_k, D_k), D_0 = D_m = 1; a stack has one more axis in front.
Every tensor of a stack gets the same bonds: the smaller of D and what the unfolding can have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def tt_svd_stack(tensors: Tensor, max_bond: int) -> list[Tensor]:
    """TT-SVD (Oseledets 2011, algorithm 1) of every tensor of a stack, with batched SVDs.

    Args:
        tensors: (n, d_1, …, d_m), of a floating dtype.
        max_bond: cap on every D_k.

    Returns:
        m cores (n, D_{k-1}, d_k, D_k), all but the last orthonormal from the left.
    """
    count, *sites = tensors.shape
    cores: list[Tensor] = []
    rest, bond = tensors.reshape(count, 1, -1), 1
    for site in sites[:-1]:
        left, values, right = torch.linalg.svd(rest.reshape(count, bond * site, -1), full_matrices=False)
        kept = min(max_bond, values.shape[1])
        cores.append(left[:, :, :kept].reshape(count, bond, site, kept))
        rest, bond = values[:, :kept, None] * right[:, :kept], kept
    cores.append(rest.reshape(count, bond, sites[-1], 1))
    return cores


def contract_stack(cores: Sequence[Tensor]) -> Tensor:
    """(n, d_1, …, d_m) of the cores that :func:`tt_svd_stack` returns."""
    left = cores[0].flatten(1, 2)
    for core in cores[1:]:
        left = torch.einsum("npa,nadb->npdb", left, core).flatten(1, 2)
    return left.reshape(len(left), *(core.shape[2] for core in cores))


def entropies(tensors: Tensor) -> Tensor:
    """(n, m − 1): entanglement entropy −Σ p ln p, p = s²/Σs², at every bond of every tensor (n, d_1, …, d_m).

    0 where a tensor is all zero.
    """
    count, *sites = tensors.shape
    found = []
    for k in range(1, len(sites)):
        values = torch.linalg.svdvals(tensors.reshape(count, math.prod(sites[:k]), -1)).square()
        total = values.sum(1, keepdim=True)
        found.append(torch.special.entr(values / total.where(total > 0, torch.ones_like(total))).sum(1))
    return torch.stack(found, 1)


def low_rank_errors(x: Tensor) -> Tensor:
    """Squared errors of the best rank-r images: (n, R + 1), column r for rank r from 0.

    Args:
        x: (n, C, H, W); the matrix of an image is (C·H, W), of which rank r needs r·(C·H + W) numbers.
    """
    values = torch.linalg.svdvals(x.flatten(1, 2)).square()
    return _tails(values)


def cosine_errors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of images of which k coefficients of a discrete cosine transform are kept.

    The transform is orthonormal (type II), over rows, columns and colours of (n, C, H, W).

    Returns:
        Two of (n, C·H·W + 1), column k for k coefficients: each image's own largest; and the same places for
        all images, those with the largest mean square over them.
    """
    channels, height, width = (_cosines(size).to(x) for size in x.shape[1:])
    squares = torch.einsum("dc,vh,uw,nchw->ndvu", channels, height, width, x).flatten(1).square()
    common = squares[:, squares.mean(0).argsort(descending=True, stable=True)]
    return _tails(squares.sort(1, descending=True).values), _tails(common)


def _tails(squares: Tensor) -> Tensor:
    """(n, K) → (n, K + 1): what is left of the sum of each row from column k on."""
    tails = squares.flip(1).cumsum(1).flip(1)
    return torch.cat([tails, tails.new_zeros(len(tails), 1)], 1)


def _cosines(size: int) -> Tensor:
    """The orthonormal matrix of the discrete cosine transform of type II, (frequency, place)."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
