"""The matrix product operator (tensor-train matrix): a chain of cores, one per site, and its algebra.

    W[j_1…j_n, i_1…i_n] = w⁽¹⁾[j_1, i_1] w⁽²⁾[j_2, i_2] … w⁽ⁿ⁾[j_n, i_n]        (Eq. 5, Gao et al. 2020)

Core k has shape (D_{k-1}, J_k, I_k, D_k), e.g. (4, 8, 16, 4), and D_0 = D_n = 1.

Stored cores are in the balanced gauge: with Schmidt values s at a bond, everything to its left has Gram
matrix diag(s), and so has everything to its right. Left-canonical cores would have all the norm in the last
core, which affects L2 regularisation and SGD.

Sums, differences and Kronecker products are exact and go core by core. Bonds add in a sum and multiply in a
product, so round the result (``MPO.rounded``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from mpoc.tensor_networks.forms.chain import contract, gather_rows, sites_of
from mpoc.tensor_networks.forms.cost import dense_wins
from mpoc.tensor_networks.forms.form import Form


class MPO(Form):
    """A weight as the cores of a chain.

    Args:
        cores: (D_{k-1}, J_k, I_k, D_k) each.
        structure: the weight's shape, factors and padding.

    Raises:
        ValueError: the cores do not have the structure's factors, or neighbouring bonds differ.
    """

    def check(self) -> None:
        """Compare the cores with the factors, and each bond from both of its sides."""
        structure = self.structure
        factors = list(zip(structure.output_factors, structure.input_factors, strict=True))
        if [tuple(core.shape[1:3]) for core in self.cores] != factors:
            shapes = [tuple(core.shape) for core in self.cores]
            raise ValueError(f"cores of shapes {shapes} where sites (J, I) are {factors}")
        left = [core.shape[0] for core in self.cores]
        right = [core.shape[3] for core in self.cores]
        if left != [1, *right[:-1]] or right[-1] != 1:
            raise ValueError(f"bonds do not meet: left {left}, right {right}")

    @property
    def bonds(self) -> tuple[int, ...]:
        """(D_0..D_n)."""
        return (*(core.shape[0] for core in self.cores), 1)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(J_1 I_1 … J_k I_k, D_k) and (D_k, J_{k+1} I_{k+1} …), cut where the two are smallest.

        Their product is the interleaved tensor; a block of its rows needs only a block of the left half.
        """
        sizes = self.structure.site_sizes
        lefts = [math.prod(sizes[:k]) for k in range(1, len(sizes))]
        total = math.prod(sizes)
        costs = [self.bonds[k + 1] * (left + total // left) for k, left in enumerate(lefts)]
        cut = costs.index(min(costs)) if costs else -1
        one = self.cores[0].new_ones(1, 1)
        left = one
        for core in self.cores[: cut + 1]:
            left = torch.einsum("pa,ajib->pjib", left, core).reshape(-1, core.shape[3])
        right = one
        for core in reversed(self.cores[cut + 1 :]):
            right = torch.einsum("ajib,bq->ajiq", core, right).reshape(core.shape[0], -1)
        return left, right

    def apply_padded(self, x: Tensor) -> Tensor:
        """(n, ΠI) → (n, ΠJ), in the cheapest order for this number of vectors."""
        return contract(x, self.cores)

    def dense_is_faster(self, batch: int) -> bool:
        """By the cost model, for ``batch`` vectors."""
        sides = self.structure.outputs, self.structure.inputs
        return dense_wins(sites_of(self.cores), sides, batch, self.cores[0].is_cuda)

    def rows(self, indices: Tensor) -> Tensor:
        """(n,) → (n, N_x), by products of core slices."""
        return gather_rows(indices, self.cores)[:, : self.structure.inputs]

    def norm(self) -> float:
        """‖Ŵ‖_F, padding included."""
        return float(torch.linalg.vector_norm(_left_canonical(self.cores)[-1]))

    def spectra(self) -> list[Tensor]:
        """Schmidt values at bonds 1..n-1, float64, descending, from the canonical form."""
        return _schmidt_sweep(_left_canonical(self.cores))[1]

    def entropies(self) -> list[float]:
        """Entanglement entropy S_k = −Σ p ln p, p = s²/Σs², at bonds 1..n-1."""
        return [entropy(values) for values in self.spectra()]

    def balanced(self) -> tuple[Self, list[Tensor]]:
        """The same weight in the balanced gauge, in float64, and the Schmidt values of its bonds.

        Schmidt values below the resolution of the cores' dtype are cut.
        """
        resolution = torch.finfo(self.cores[0].dtype).eps
        cores, spectra = _schmidt_sweep(_left_canonical(self.cores), resolution)
        for k, values in enumerate(spectra):
            root = values.sqrt()
            cores[k] = cores[k] / root.clamp(min=torch.finfo(root.dtype).tiny)  # 0/0 of a zero weight is 0
            cores[k + 1] = cores[k + 1] * root[:, None, None, None]
        return self.with_cores(cores), spectra

    def rounded(
        self, max_bond: int, tolerance: float = 0.0, discard: float = 0.0
    ) -> tuple[MPO, list[Tensor]]:
        """TT-rounding (Oseledets 2011, algorithm 2): truncate to smaller bonds.

        The squared error equals the sum of the squares discarded at the successive truncations.

        Args:
            max_bond: cap on every D_k.
            tolerance: relative Frobenius error that may be made to get bonds below the cap.
            discard: share of its squared singular values that each bond may lose in addition.

        Returns:
            The MPO in the balanced gauge, in float64, and the Schmidt values of its bonds.
        """
        cores = _left_canonical(self.cores)
        budget = tolerance**2 * float(cores[-1].square().sum())
        return MPO(_schmidt_sweep(cores, 0.0, max_bond, budget, discard)[0], self.structure).balanced()


def rank_within(singular_values: Tensor, max_bond: int, discard: float) -> tuple[int, float]:
    """The smallest rank that loses at most ``discard``, capped at ``max_bond``, and the weight lost."""
    tails = singular_values.square().flip(0).cumsum(0).flip(0)  # tails[r] = weight lost at rank r
    tails = torch.cat([tails, tails.new_zeros(1)])
    rank = int((tails > discard).sum().item())
    rank = max(1, min(rank, max_bond))
    return rank, float(tails[rank])


def entropy(values: Tensor) -> float:
    """−Σ p ln p with p = s²/Σs²; 0 if all values are zero."""
    weights = values.double().square()
    total = float(weights.sum())
    if total == 0.0:
        return 0.0
    p = weights[weights > 0] / total
    return max(0.0, float(-(p * p.log()).sum()))


def _left_canonical(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same operator in float64, with all cores but the last orthonormal from the left."""
    canonical: list[Tensor] = []
    carry = torch.ones(1, 1, dtype=torch.float64, device=cores[0].device)
    for core in cores[:-1]:
        core = torch.einsum("ab,bjic->ajic", carry, core.double())
        orthonormal, carry = torch.linalg.qr(core.flatten(0, 2))
        canonical.append(orthonormal.reshape(*core.shape[:3], -1))
    canonical.append(torch.einsum("ab,bjic->ajic", carry, cores[-1].double()))
    return canonical


def _schmidt_sweep(
    cores: list[Tensor],
    resolution: float = 0.0,
    max_bond: int | None = None,
    budget: float = 0.0,
    discard: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Right-canonical cores (the first holds the norm) and the singular values kept at every bond.

    These are the Schmidt values unless something was discarded.

    Args:
        cores: left-canonical cores; the list is changed.
        resolution: cut singular values at or below this share of the bond's largest.
        max_bond: cap on every bond.
        budget: squared error that may be made in total to get smaller bonds.
        discard: share of its squared singular values that each bond may lose in addition.
    """
    spectra: list[Tensor] = []
    for k in range(len(cores) - 1, 0, -1):
        core = cores[k]
        left, values, right = torch.linalg.svd(core.flatten(1), full_matrices=False)
        kept = max(1, int((values > resolution * values[0]).sum()))
        if max_bond is not None:
            share = budget / k + discard * float(values.square().sum())
            kept, lost = rank_within(values, min(max_bond, kept), share)
            budget = max(budget - lost, 0.0) if budget else 0.0
        cores[k] = right[:kept].reshape(kept, *core.shape[1:])
        carry = left[:, :kept] * values[:kept]
        cores[k - 1] = torch.einsum("ajib,bc->ajic", cores[k - 1], carry)
        spectra.append(values[:kept])
    return cores, spectra[::-1]


def add(first: MPO, second: MPO) -> MPO:
    """The sum, by the direct sum of bonds: D_k = D_k(first) + D_k(second) at inner bonds.

    Raises:
        ValueError: the two have different structures.
    """
    if first.structure != second.structure:
        raise ValueError(f"a sum of different structures: {first.structure} and {second.structure}")
    last = len(first.cores) - 1
    cores = [
        _direct_sum(one, other, k == 0, k == last)
        for k, (one, other) in enumerate(zip(first.cores, second.cores, strict=True))
    ]
    return MPO(cores, first.structure)


def subtract(first: MPO, second: MPO) -> MPO:
    """``first − second``; see :func:`add`."""
    return add(first, MPO([-second.cores[0], *second.cores[1:]], second.structure))


def _direct_sum(one: Tensor, other: Tensor, first: bool, last: bool) -> Tensor:
    """Block diagonal in the bonds; the outer bonds of the chain, of size 1, are shared."""
    if first and last:
        return one + other
    if first or last:
        return torch.cat([one, other], dim=3 if first else 0)
    upper = torch.cat([one, one.new_zeros(*one.shape[:3], other.shape[3])], dim=3)
    lower = torch.cat([other.new_zeros(*other.shape[:3], one.shape[3]), other], dim=3)
    return torch.cat([upper, lower], dim=0)


def kronecker(factors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Cores of A ⊗ B ⊗ …; each site's output and input indices are in that order, the last fastest.

    Args:
        factors: the cores of each factor, all with the same number of sites.
    """
    return [reduce(_kronecker, cores) for cores in zip(*factors, strict=True)]


def _kronecker(one: Tensor, other: Tensor) -> Tensor:
    product = torch.einsum("ajib,clkd->acjlikbd", one, other)
    return product.flatten(6, 7).flatten(4, 5).flatten(2, 3).flatten(0, 1)
