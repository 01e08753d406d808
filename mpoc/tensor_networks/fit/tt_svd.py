"""Fit chains, trees and sums by successive truncated SVDs of the weight.

TT-SVD (Oseledets 2011, algorithm 1) cuts the interleaved tensor site by site from the left. The hierarchical
SVD (Grasedyck 2010) cuts off the branches of a tree from the sites upwards: all sites, then their pairs,
level by level; the two halves of the whole share one bond, so the last core takes the rest.

In both, each cut is one call of ``truncate`` on what the earlier cuts left, and all cores but the last are
orthonormal. So the squared error equals the sum of the squares that the cuts discarded; that of a tree over n
sites is at most 2n − 3 times the optimum. The cores are then brought to the balanced gauge.

The trade-off: each cut is of a smaller tensor than the weight (Vannieuwenhoven, Vandebril, Meerbergen 2012),
so the weight's own entropies are known only until a cut has discarded something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import (
    DEFAULT_TARGET,
    Target,
    TruncatedSVD,
    Truncation,
    exponent_of,
    scaled,
    spread,
    squared_norm,
    truncate,
)
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import interleave, unpadded, working_dtype
from mpoc.tensor_networks.forms.mpo import MPO, entropy
from mpoc.tensor_networks.forms.sum import Sum
from mpoc.tensor_networks.forms.tree import Tree
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import branches, halves


@dataclass(frozen=True)
class Fit:
    """A fitted form, its error, and its bonds' entropies and spectra."""

    form: Form
    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F of the stored cores, without padding
    entropies: list[float]  # of Ŵ, at bonds 1..n-1 of a chain or the branches of a tree
    entropies_of_weight: list[float | None]  # of W; None if the full spectrum was not computed
    spectra_of_weight: list[Tensor | None]  # of W, descending; None if unknown or if nothing is cut off
    routes: list[str]  # how each bond was truncated


def tt_svd(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Factorise a weight as an MPO.

    Args:
        weight: a tensor of shape ``structure.shape``, of any floating dtype.
        structure: its factors, padding and lead site.
        truncation: how far bonds are truncated.
        target: dtype of the cores, and seed.

    Returns:
        Cores in the balanced gauge; the error is measured on exactly these cores.
    """
    return swept(_sweep, weight, structure, truncation, target)


@dataclass(frozen=True)
class BondSpectrum:
    """The spectrum of the weight at one bond, as far as its truncation computed it."""

    entropy: float | None  # this and the next two as in :class:`Fit`
    spectrum: Tensor | None
    route: str


class Truncations:
    """Successive truncations of one weight that share an error budget.

    Args:
        truncation: how far bonds are truncated.
        norm: squared norm of the weight.
        seed: seed of the randomised range finder.
        stored: a dtype that holds every entry of the weight exactly.
    """

    def __init__(
        self, truncation: Truncation, norm: float, seed: int, stored: torch.dtype | None = None
    ) -> None:
        self.max_bond, self.discard, self.norm = truncation.max_bond, truncation.discard, norm
        self.budget = truncation.tolerance**2 * norm  # squared error that may still be made
        self.generator = torch.Generator().manual_seed(seed)
        self.cuts: list[BondSpectrum] = []
        self._lossless = True  # nothing was discarded yet
        self._stored = stored  # until the first truncation

    def next(self, rest: Tensor, to_come: int) -> TruncatedSVD:
        """Truncate an unfolding of what is left; ``to_come`` bonds, this one included, share the budget.

        The weight's own spectrum is known as long as nothing was discarded. If this cut discards nothing, the
        spectrum is also that of the cores and is not recorded.
        """
        share = self.budget / to_come + self.discard * self.norm
        cut = truncate(rest, self.max_bond, share, self.generator, self.norm, self._stored)
        self._stored = None
        values, lossless = cut.singular_values if self._lossless else None, cut.discarded <= 0.0
        known = None if values is None else entropy(values)
        self.cuts.append(BondSpectrum(known, None if lossless else values, cut.route))
        self.budget = max(self.budget - cut.discarded, 0.0)
        self.norm -= cut.discarded
        self._lossless = self._lossless and lossless
        return cut


Sweep = Callable[[Tensor, Structure, Truncations], tuple[Form, list[BondSpectrum]]]


def swept(
    sweep: Sweep,
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target,
) -> Fit:
    """Factorise a weight by successive truncations of its interleaved tensor; see :func:`tt_svd`."""
    tensor = interleave(weight, structure)
    exponent = exponent_of(tensor)
    tensor = scaled(tensor, -exponent)
    norm = squared_norm(tensor)
    stored = None if exponent else weight.dtype
    form, cuts = sweep(tensor, structure, Truncations(truncation, norm, target.seed, stored))
    return stored_fit(tensor, norm, form, target.dtype or weight.dtype, cuts, exponent)


def stored_fit(
    tensor: Tensor,
    weight_norm: float,
    form: Form,
    dtype: torch.dtype,
    cuts: Sequence[BondSpectrum] = (),
    exponent: int = 0,
) -> Fit:
    """Bring cores to the stored gauge and dtype, and measure their error.

    Args:
        tensor: the interleaved weight.
        weight_norm: its squared norm.
        form: the fitted form, in any gauge.
        dtype: dtype of the stored cores.
        cuts: spectrum of each bond.
        exponent: e, if the weight itself is 2ᵉ · ``tensor``.
    """
    balanced, spectra = form.balanced()
    stored = form.with_cores([core.to(dtype) for core in _spread(balanced, exponent)])
    working = form.with_cores([core.to(tensor.dtype) for core in stored.cores])
    return Fit(
        stored,
        _relative_error(tensor, weight_norm, form.with_cores(_spread(working, -exponent))),
        [entropy(values) for values in spectra],
        [cut.entropy for cut in cuts],
        [cut.spectrum for cut in cuts],
        [cut.route for cut in cuts],
    )


def error_of_form(weight: Tensor, form: Form) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F of a form against its weight, without padding."""
    tensor = interleave(weight, form.structure)
    exponent = exponent_of(tensor)
    tensor = scaled(tensor, -exponent)
    working = form.with_cores([core.to(tensor.dtype) for core in form.cores])
    return _relative_error(tensor, squared_norm(tensor), form.with_cores(_spread(working, -exponent)))


def _spread(form: Form, exponent: int) -> list[Tensor]:
    """The cores of 2ᵉ times the weight."""
    return [core for term in form.terms for core in spread(term.cores, exponent)]


def _sweep(tensor: Tensor, structure: Structure, truncations: Truncations) -> tuple[MPO, list[BondSpectrum]]:
    """Left-canonical cores, and the spectrum of every bond."""
    *sides, last = zip(structure.output_factors, structure.input_factors, strict=True)
    cores: list[Tensor] = []
    rest, bond = tensor, 1
    for k, (j, i) in enumerate(sides):
        cut = truncations.next(rest.reshape(bond * j * i, -1), len(sides) - k)
        cores.append(cut.left.reshape(bond, j, i, -1))
        rest, bond = cut.right, cut.left.shape[1]
    cores.append(rest.reshape(bond, *last, 1))
    return MPO(cores, structure), truncations.cuts


def _relative_error(tensor: Tensor, weight_norm: float, form: Form) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F against the interleaved weight, one block of rows at a time; 0 for 0/0."""
    left, right = form.halves()
    target = tensor.reshape(left.shape[0], right.shape[1])
    inside = None
    if any(form.structure.padding):
        inside = unpadded(form.structure, tensor.device).reshape(target.shape)
    rows = max(1, (1 << 22) // target.shape[1])
    parts: list[float] = []
    for start in range(0, target.shape[0], rows):
        block = slice(start, start + rows)
        difference = torch.addmm(target[block], left[block], right, alpha=-1)
        if inside is not None:
            difference.mul_(inside[block])
        parts.append(squared_norm(difference))
    return math.sqrt(math.fsum(parts) / weight_norm) if weight_norm else 0.0


def tree_svd(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Factorise a weight as a tree; arguments as for :func:`tt_svd`.

    Returns:
        As :func:`tt_svd`, with one entropy and one route per branch, in the order of the cores.
    """
    return swept(_tree_sweep, weight, structure, truncation, target)


def _tree_sweep(
    tensor: Tensor, structure: Structure, truncations: Truncations
) -> tuple[Tree, list[BondSpectrum]]:
    """The tree, and the spectrum of every branch."""
    sites = len(structure.site_sizes)
    spans = branches(sites)
    axes = [range(k, k + 1) for k in range(sites)]  # of ``rest``
    cores: dict[range, Tensor] = {}
    rest, smallest_first = tensor, sorted(spans, key=len)
    for count, span in enumerate(smallest_first):
        parts = _parts(span)
        others = [axis for axis in axes if axis not in parts]
        rest = rest.permute([axes.index(axis) for axis in (*parts, *others)])
        inside, outside = rest.shape[: len(parts)], rest.shape[len(parts) :]
        cut = truncations.next(rest.reshape(math.prod(inside), -1), len(spans) - count)
        cores[span] = cut.left.reshape(*inside, -1)
        rest, axes = cut.right.reshape(-1, *outside), [span, *others]
    cuts = dict(zip(smallest_first, truncations.cuts, strict=True))
    return _joined(cores, rest, axes, structure), [cuts[span] for span in spans]


def _joined(cores: dict[range, Tensor], rest: Tensor, axes: list[range], structure: Structure) -> Tree:
    """The tree of all branches; what is left of the weight becomes the core of the right half."""
    sites = len(structure.site_sizes)
    if sites == 1:
        return Tree([rest.reshape(structure.output_factors + structure.input_factors)], structure)
    left, right = halves(range(sites))
    last = rest.permute([axes.index(axis) for axis in (*_parts(right), left)])
    cores = cores | {right: last}
    return Tree([_with_sides(cores[s], s, structure) for s in (*branches(sites), right)], structure)


def fit_sum(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Fit the nearest matrix of rank ``truncation.rank``, and an MPO to the remainder.

    Arguments as for :func:`tt_svd`.
    """
    own, added = structure.parts
    exponent = exponent_of(weight)
    scaled_weight = scaled(weight.to(working_dtype(weight.dtype)), -exponent)
    low_rank = tt_svd(scaled_weight, added, Truncation(truncation.rank), Target(seed=target.seed)).form
    mpo = tt_svd(scaled_weight - low_rank.to_weight(), own, truncation, Target(seed=target.seed)).form
    tensor = interleave(scaled_weight, structure)
    dtype = target.dtype or weight.dtype
    return stored_fit(tensor, squared_norm(tensor), Sum.of(mpo, low_rank), dtype, exponent=exponent)


def _parts(span: range) -> tuple[range, ...]:
    """The branches that a branch's core joins: the site itself, or two halves."""
    return (span,) if len(span) == 1 else halves(span)


def _with_sides(core: Tensor, span: range, structure: Structure) -> Tensor:
    """(J_k I_k, D) → (J_k, I_k, D) for the core of a site; other cores stay."""
    if len(span) > 1:
        return core
    return core.unflatten(0, (structure.output_factors[span.start], structure.input_factors[span.start]))
