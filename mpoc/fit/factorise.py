"""A weight alone to the cores of its structure, whatever joins the sites."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.fit.conv_map import fit_conv_map
from mpoc.fit.mera import fit_mera
from mpoc.fit.tree import tree_svd
from mpoc.fit.ttsvd import Fit, tt_svd
from mpoc.structure import Structure

_FITS = {
    "chain": tt_svd,
    "tree": tree_svd,
    "mera": fit_mera,
}


def factorise(
    weight: Tensor,
    structure: Structure,
    max_bond: int,
    tolerance: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    discard: float = 0.0,
) -> Fit:
    """As :func:`mpoc.fit.ttsvd.tt_svd`, of the form that ``structure`` is."""
    fit = _FITS[structure.network] if structure.geometry is None else fit_conv_map
    return fit(weight, structure, max_bond, tolerance, dtype, seed, discard)
