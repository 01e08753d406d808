"""Gram matrices of what surrounds each core of a network: a descent divides by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mpoc.forms.contraction import Legs, along

# A bond's directions of less than this share of its mean weight are not scaled up further.
_FLOOR = 1e-4

Place = tuple[int, int]  # core, axis


def inverse_grams(cores: Sequence[Tensor], legs: Sequence[Legs]) -> list[dict[int, Tensor]]:
    """For every core, by axis, the inverse Gram matrix of everything beyond the bond there.

    Nothing where bonds close a loop: there what surrounds a core is no product of such matrices.
    """
    places: dict[str, list[Place]] = defaultdict(list)
    for k, names in enumerate(legs):
        for axis, name in enumerate(names):
            places[name].append((k, axis))
    bonds = [ends for ends in places.values() if len(ends) == 2]
    if len(bonds) != len(cores) - 1:
        return [{} for _ in cores]
    beyond = {here: there for ends in bonds for here, there in (ends, ends[::-1])}
    grams: dict[Place, Tensor] = {}
    found: list[dict[int, Tensor]] = [{} for _ in cores]
    for (k, axis), there in beyond.items():
        found[k][axis] = _inverse(_gram(cores, there, beyond, grams))
    return found


def _gram(
    cores: Sequence[Tensor], place: Place, beyond: dict[Place, Place], known: dict[Place, Tensor]
) -> Tensor:
    """Over one axis of a core: of the core and all that hangs on its other axes."""
    if place not in known:
        k, axis = place
        weighed = cores[k]
        for other in range(weighed.dim()):
            if other != axis and (k, other) in beyond:
                weighed = along(weighed, other, _gram(cores, beyond[k, other], beyond, known))
        rows, columns = (core.movedim(axis, 0).flatten(1) for core in (cores[k], weighed))
        known[place] = rows @ columns.T
    return known[place]


def _inverse(gram: Tensor) -> Tensor:
    """Of Gram matrices that may be singular, or zero."""
    regular = gram.double()
    regular.diagonal().add_(_FLOOR * regular.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular)).to(gram.dtype)
