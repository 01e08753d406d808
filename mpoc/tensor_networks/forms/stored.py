"""What a layer stores: one form, or the sum of an MPO and a low-rank part (form ``svd+mpo``).

    Ŵ = MPO(cores) + L R

The low-rank part's two cores, (1, N_y, 1, r) and (r, 1, N_x, 1), follow those of the MPO.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.mera import Mera
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.forms.tree import Tree, tree_chain
from mpoc.tensor_networks.structure import Structure

_FORMS: dict[str, type[Form]] = {"chain": MPO, "tree": Tree, "mera": Mera}


def form_of(cores: Sequence[Tensor], structure: Structure) -> Form:
    """The cores as the form that the structure's network is.

    Raises:
        ValueError: they do not fit.
    """
    return _FORMS[structure.network](cores, structure)


def as_chain(cores: Sequence[Tensor], structure: Structure) -> list[Tensor]:
    """Cores of an MPO of the same weight: a chain's own, or two made of a tree's halves."""
    return tree_chain(cores) if structure.network == "tree" else list(cores)


def split(cores: Sequence[Tensor], structure: Structure) -> tuple[list[Tensor], list[Tensor]]:
    """The cores of the form, and those of an added low-rank part (none: empty), unchecked."""
    if structure.network != "chain":
        return list(cores), []
    count = len(structure.output_factors)
    return list(cores[:count]), list(cores[count:])


def forms_of(cores: Sequence[Tensor], structure: Structure) -> list[Form]:
    """One form, or the MPO and the low-rank part that is added to it.

    Args:
        cores: as stored.
        structure: of the first.

    Raises:
        ValueError: the cores fit neither, or a low-rank part is added to a whole map.
    """
    first, added = split(cores, structure)
    one = form_of(first, structure)
    return [one, MPO(added, structure.as_low_rank())] if added else [one]


def weight_of(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The dense weight in the checkpoint's own shape, in the cores' dtype.

    Raises:
        ValueError: as :func:`forms_of`.
    """
    first, *added = (form.to_weight() for form in forms_of(cores, structure))
    return first + added[0] if added else first
