"""Sums, differences and Kronecker products of matrix product operators, exact, core by core.

Bonds add in a sum and multiply in a product: round the result (``MPO.rounded``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mpoc.forms.mpo import MPO


def add(first: MPO, second: MPO) -> MPO:
    """The sum, by the direct sum of bonds: D_k = D_k(first) + D_k(second) inside.

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
    """Cores of A ⊗ B ⊗ …, each site's output and input indices in that order, the last fastest.

    Args:
        factors: the cores of each factor, all with the same number of sites.
    """
    return [reduce(_kronecker, cores) for cores in zip(*factors, strict=True)]


def _kronecker(one: Tensor, other: Tensor) -> Tensor:
    product = torch.einsum("ajib,clkd->acjlikbd", one, other)
    return product.flatten(6, 7).flatten(4, 5).flatten(2, 3).flatten(0, 1)
