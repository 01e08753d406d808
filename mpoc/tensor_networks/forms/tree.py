"""The tree tensor network: a binary tree over the sites (hierarchical Tucker; Hackbusch & Kühn 2009).

    W = Σ_d L[(j i of the left half), d] R[d, (j i of the right half)]

Each half is a site's core (J_k, I_k, D), or two halves joined by a core (D_left, D_right, D). Order and legs
of the cores are those of :mod:`mpoc.tensor_networks.topology`.

Stored cores are in the balanced gauge, as those of an MPO: with Schmidt values s at a branch, everything
below it has Gram matrix diag(s), and so has everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

import torch
from torch import Tensor

from mpoc.tensor_networks.forms.chain import contract, gather_rows, sites_of
from mpoc.tensor_networks.forms.contraction import along, traced_once
from mpoc.tensor_networks.forms.cost import dense_wins
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.mpo import entropy
from mpoc.tensor_networks.topology import branches, halves


class Tree(Form):
    """A weight as a tree.

    Args:
        cores: (J_k, I_k, D) for a site, (D_left, D_right, D) for a pair of branches, children first.
        structure: a structure of the form ``tree``.

    Raises:
        ValueError: the cores do not have the structure's factors, or bonds do not meet.
    """

    def check(self) -> None:
        """Check that every core has three legs, and then as :meth:`Form.check`."""
        if len(self.cores) > 1 and any(core.dim() != 3 for core in self.cores):
            raise ValueError("the cores of a tree have three legs")
        super().check()

    @property
    def bonds(self) -> tuple[int, ...]:
        """D of every branch, as :func:`mpoc.tensor_networks.topology.branches` orders them."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    def halves(self) -> tuple[Tensor, Tensor]:
        """(ΠJI of the left half, D) and (D, ΠJI of the right half), interleaved."""
        if len(self.cores) == 1:
            return self.cores[0].reshape(-1, 1), self.cores[0].new_ones(1, 1)
        left, right = (self.branch(span) for span in halves(range(len(self.structure.site_sizes))))
        return left, right.T

    def branch(self, span: range) -> Tensor:
        """(ΠJI of the sites of ``span``, interleaved; D)."""
        core = self._core(span)
        if len(span) == 1:
            return core.flatten(0, 1)
        left, right = (self.branch(half) for half in halves(span))
        return torch.einsum("pa,abd,qb->pqd", left, core, right).flatten(0, 1)

    def apply_padded(self, x: Tensor) -> Tensor:
        """(n, ΠI) → (n, ΠJ), through the MPO of the two halves."""
        return contract(x, tree_chain(self.cores))

    def dense_is_faster(self, batch: int) -> bool:
        """By the cost model for the MPO of the two halves, and three operations a core to make it."""
        chain = tree_chain([core.detach().to("meta") for core in self.cores])
        sides = self.structure.outputs, self.structure.inputs
        return dense_wins(sites_of(chain), sides, batch, self.cores[0].is_cuda, made=3 * len(self.cores))

    def rows(self, indices: Tensor) -> Tensor:
        """(n,) → (n, N_x), from the MPO of the two halves."""
        return gather_rows(indices, tree_chain(self.cores))[:, : self.structure.inputs]

    def spectra(self) -> list[Tensor]:
        """Schmidt values of every branch against the rest, float64, descending, from the canonical form."""
        return _canonical(self.cores)[1]

    def entropies(self) -> list[float]:
        """Entanglement entropy S = −Σ p ln p, p = s²/Σs², of every branch."""
        return [entropy(values) for values in self.spectra()]

    def balanced(self) -> tuple[Self, list[Tensor]]:
        """The same weight in the balanced gauge, in float64, and the Schmidt values of its branches.

        Schmidt values below the resolution of the cores' dtype are cut.
        """
        cores, spectra = _canonical(self.cores, torch.finfo(self.cores[0].dtype).eps)
        for k, ((above, axis), values) in enumerate(zip(_meetings(len(cores)), spectra, strict=True)):
            root = values.sqrt()
            cores[k] = cores[k] * root
            inverse = torch.where(root > 0, 1 / root, 0.0)  # 0/0 of a zero weight is 0
            cores[above] = (cores[above].movedim(axis, -1) * inverse).movedim(-1, axis)
        return self.with_cores(cores), spectra

    def _core(self, span: range) -> Tensor:
        spans = branches(len(self.structure.site_sizes))
        return self.cores[spans.index(span) if span in spans else -1]


@cache
def _meetings(cores: int) -> tuple[tuple[int, int], ...]:
    """For each core but the last, the number of the core above it, and the axis at which they meet.

    The core above comes later in the list; the last core is at the top.
    """
    whole = range((cores + 2) // 2)
    spans = [*branches(len(whole)), halves(whole)[-1]]
    above = {halves(whole)[0]: (len(spans) - 1, 2)}
    for k, span in enumerate(spans):
        if len(span) > 1:
            above |= {half: (k, axis) for axis, half in enumerate(halves(span))}
    return tuple(above[span] for span in spans[:-1])


def _canonical(cores: Sequence[Tensor], resolution: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """The same weight in the Schmidt bases of its branches, all cores but the last orthonormal from below.

    QR decompositions from the sites upwards, then singular values from the last core downwards.

    Args:
        cores: the cores of a tree.
        resolution: cut singular values at or below this share of the branch's largest.

    Returns:
        The cores, float64, and the Schmidt values of each branch, descending.
    """
    cores = [core.double() for core in cores]
    meetings = _meetings(len(cores))
    for k, (above, axis) in enumerate(meetings):
        orthonormal, rest = torch.linalg.qr(cores[k].flatten(0, -2))
        cores[k] = orthonormal.reshape(*cores[k].shape[:-1], -1)
        cores[above] = along(cores[above], axis, rest)
    spectra: dict[int, Tensor] = {}
    for k, (above, axis) in reversed(list(enumerate(meetings))):
        centre = cores[above] * spectra[above] if above in spectra else cores[above]
        unfolded = centre.movedim(axis, -1).flatten(0, -2)
        _, values, right = torch.linalg.svd(unfolded, full_matrices=False)
        kept = max(1, int((values > resolution * values[0]).sum()))
        spectra[k], right = values[:kept], right[:kept]
        cores[above] = along(cores[above], axis, right)
        cores[k] = cores[k] @ right.T
    return cores, [spectra[k] for k in range(len(meetings))]


def tree_chain(cores: Sequence[Tensor]) -> list[Tensor]:
    """A tree's weight as an MPO of two sites, one for each half: (1, J, I, D) and (D, J, I, 1)."""
    if len(cores) == 1:
        return [cores[0][None, :, :, None]]
    joins, left = _plan(len(cores))
    made: list[Tensor] = []  # (ΠJ, ΠI, D) of every branch
    for core, (a, b) in zip(cores, joins, strict=True):
        if a >= 0:
            core = torch.einsum("jia,abd,pqb->jpiqd", made[a], core, made[b]).flatten(2, 3).flatten(0, 1)
        made.append(core)
    return [made[left][None], made[-1].permute(2, 0, 1)[..., None]]


@cache
def _joined(cores: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """For each core the numbers of the two cores it joins, -1 for a site; and the number of the left half."""
    sites = range((cores + 2) // 2)
    spans = [*branches(len(sites)), halves(sites)[1]]
    joins = []
    for span in spans:
        a, b = map(spans.index, halves(span)) if len(span) > 1 else (-1, -1)
        joins.append((a, b))
    return tuple(joins), spans.index(halves(sites)[0])


_plan = traced_once(_joined)
