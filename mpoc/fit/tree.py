"""Hierarchical SVD: a weight to a tree by successive truncated SVDs (Grasedyck 2010).

Branches are cut off from the sites upwards: all sites, then their pairs, level by level.  Each cut is one
call of ``truncate`` on (branch) × (rest) of what the cuts before left; the two halves of the whole share one
bond, so the last core takes the rest.  All other cores are orthonormal from below: the squared error equals
the sum of what the cuts discarded, and is at most 2n − 3 times that of the best tree over n sites.  The cores
are then put into the balanced gauge.

The trade-off: each cut is of a smaller tensor than the weight (Vannieuwenhoven, Vandebril, Meerbergen 2012),
and so the weight's own entropies are known only until something was discarded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoc.fit.ttsvd import Cut, Fit, Truncations, swept
from mpoc.forms.tree import Tree
from mpoc.structure import Structure
from mpoc.wiring import branches, halves


def tree_svd(
    weight: Tensor,
    structure: Structure,
    max_bond: int,
    tolerance: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    discard: float = 0.0,
) -> Fit:
    """Factorise ``weight`` with the bond of every branch at most ``max_bond``.

    Args:
        weight: of shape ``structure.shape``; any floating dtype.
        structure: its network is ``tree``.
        max_bond, tolerance, dtype, seed, discard: as in :func:`mpoc.fit.ttsvd.tt_svd`.

    Returns:
        As :func:`mpoc.fit.ttsvd.tt_svd`; entropies and routes one a branch, in the order of the cores.
    """
    return swept(_sweep, weight, structure, max_bond, tolerance, dtype, seed, discard)


def _sweep(tensor: Tensor, structure: Structure, truncations: Truncations) -> tuple[Tree, list[Cut]]:
    """The tree, and what is told of every branch."""
    sites = len(structure.site_sizes)
    spans = branches(sites)
    axes = [range(k, k + 1) for k in range(sites)]  # of ``rest``
    cores: dict[range, Tensor] = {}
    rest, smallest_first = tensor, sorted(spans, key=len)
    for done, span in enumerate(smallest_first):
        parts = _parts(span)
        others = [axis for axis in axes if axis not in parts]
        rest = rest.permute([axes.index(axis) for axis in (*parts, *others)])
        inside, outside = rest.shape[: len(parts)], rest.shape[len(parts) :]
        cut = truncations.next(rest.reshape(math.prod(inside), -1), len(spans) - done)
        cores[span] = cut.left.reshape(*inside, -1)
        rest, axes = cut.right.reshape(-1, *outside), [span, *others]
    told = dict(zip(smallest_first, truncations.cuts, strict=True))
    return _joined(cores, rest, axes, structure), [told[span] for span in spans]


def _joined(cores: dict[range, Tensor], rest: Tensor, axes: list[range], structure: Structure) -> Tree:
    """The tree of all branches but the right half, which what is left of the weight joins to the left one."""
    sites = len(structure.site_sizes)
    if sites == 1:
        return Tree([rest.reshape(structure.output_factors + structure.input_factors)], structure)
    left, right = halves(range(sites))
    last = rest.permute([axes.index(axis) for axis in (*_parts(right), left)])
    cores = cores | {right: last}
    return Tree([_with_sides(cores[s], s, structure) for s in (*branches(sites), right)], structure)


def _parts(span: range) -> tuple[range, ...]:
    """What a branch's core joins: the site itself, or two halves."""
    return (span,) if len(span) == 1 else halves(span)


def _with_sides(core: Tensor, span: range, structure: Structure) -> Tensor:
    """The core of a site from (J_k I_k, D) to (J_k, I_k, D)."""
    if len(span) > 1:
        return core
    return core.unflatten(0, (structure.output_factors[span.start], structure.input_factors[span.start]))
