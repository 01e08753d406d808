"""What a layer stores: one MPO, or the sum of an MPO and a low-rank part (form ``svd+mpo``).

    Ŵ = MPO(cores) + L R

The low-rank part's two cores, (1, N_y, 1, r) and (r, 1, N_x, 1), follow those of the MPO.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpoc.forms.mpo import MPO
from mpoc.structure import Structure


def split(cores: Sequence[Tensor], structure: Structure) -> tuple[list[Tensor], list[Tensor]]:
    """The cores of the MPO, and those of an added low-rank part (none: empty), unchecked."""
    count = len(structure.output_factors)
    return list(cores[:count]), list(cores[count:])


def chains(cores: Sequence[Tensor], structure: Structure) -> list[MPO]:
    """One MPO, or the MPO and the low-rank part that is added to it.

    Args:
        cores: (D_{k-1}, J_k, I_k, D_k) each, as stored.
        structure: of the MPO.

    Raises:
        ValueError: the cores fit neither, or a low-rank part is added to a whole map.
    """
    first, added = split(cores, structure)
    one = MPO(first, structure)
    return [one, MPO(added, structure.as_low_rank())] if added else [one]


def weight_of(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The dense weight in the checkpoint's own shape, in the cores' dtype.

    Raises:
        ValueError: as :func:`chains`.
    """
    first, *added = (form.to_weight() for form in chains(cores, structure))
    return first + added[0] if added else first
