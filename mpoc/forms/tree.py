"""The tree tensor network: a binary tree over the sites (hierarchical Tucker; Hackbusch & Kühn 2009).

    W = Σ_d L[(j i of the left half), d] R[d, (j i of the right half)]

Each half is a site's core (J_k, I_k, D), or two halves again joined by a core (D_left, D_right, D).  Order
and legs of the cores are those of :mod:`mpoc.wiring`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpoc.forms.form import Form
from mpoc.forms.layout import deinterleave_matrix
from mpoc.structure import Structure
from mpoc.wiring import branches, halves


class Tree(Form):
    """A weight as a tree.

    Args:
        cores: (J_k, I_k, D) of a site, (D_left, D_right, D) of a pair of branches, children first.
        structure: its network is ``tree``.

    Raises:
        ValueError: the cores do not have the structure's factors, or bonds do not meet.
    """

    def __init__(self, cores: Sequence[Tensor], structure: Structure) -> None:
        super().__init__(cores, structure)
        if len(self.cores) > 1 and any(core.dim() != 3 for core in self.cores):
            raise ValueError("the cores of a tree have three legs")
        self._check(self.bonds)

    @property
    def bonds(self) -> tuple[int, ...]:
        """D of every branch, as :func:`mpoc.wiring.branches` orders them."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    def chain(self) -> list[Tensor]:
        """The same weight as an MPO of two sites, one for each half: (1, J, I, D) and (D, J, I, 1)."""
        if len(self.cores) == 1:
            return [self.cores[0][None, :, :, None]]
        left, right = (self._half(span) for span in halves(range(len(self.structure.site_sizes))))
        return [left[None], right.permute(2, 0, 1)[..., None]]

    def to_matrix(self) -> Tensor:
        """(lead, outputs, inputs) without padding, in the cores' dtype."""
        if len(self.cores) == 1:
            return deinterleave_matrix(self.cores[0], self.structure)
        left, right = (self.branch(span) for span in halves(range(len(self.structure.site_sizes))))
        return deinterleave_matrix(left @ right.T, self.structure)

    def branch(self, span: range) -> Tensor:
        """(ΠJI of the sites of ``span``, interleaved; D)."""
        core = self._core(span)
        if len(span) == 1:
            return core.flatten(0, 1)
        left, right = (self.branch(half) for half in halves(span))
        return torch.einsum("pa,abd,qb->pqd", left, core, right).flatten(0, 1)

    def _half(self, span: range) -> Tensor:
        """(ΠJ, ΠI, D)."""
        core = self._core(span)
        if len(span) == 1:
            return core
        left, right = (self._half(half) for half in halves(span))
        joined = torch.einsum("jia,abd,pqb->jpiqd", left, core, right)
        return joined.flatten(2, 3).flatten(0, 1)

    def _core(self, span: range) -> Tensor:
        spans = branches(len(self.structure.site_sizes))
        return self.cores[spans.index(span) if span in spans else -1]
