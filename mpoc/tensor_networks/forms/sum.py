"""The sum of an MPO and a low-rank matrix (form ``svd+mpo``).

    Ŵ = MPO(cores) + L R

In measurements, such a sum has a smaller error than either part alone at the same size. The two cores of the
low-rank part, (1, N_y, 1, r) and (r, 1, N_x, 1), follow those of the MPO. They have no padding, and no site
for taps or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from torch import Tensor
from torch.nn.functional import pad

from mpoc.tensor_networks.forms.chain import contract, sites_of
from mpoc.tensor_networks.forms.cost import dense_wins
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure


class Sum(Form):
    """A weight as an MPO plus a low-rank matrix.

    Args:
        cores: the cores of the MPO, then (1, N_y, 1, r) and (r, 1, N_x, 1).
        structure: a structure with the factors of the MPO.
        check: compare the cores with the structure.

    Raises:
        ValueError: the cores of one part do not fit it.
    """

    name = "svd+mpo"

    def __init__(self, cores: Sequence[Tensor], structure: Structure, check: bool = True) -> None:
        own, added = structure.parts
        self.mpo = MPO(cores[:-2], own, check)
        self.low_rank = MPO(cores[-2:], added, check)
        super().__init__(cores, structure, check=False)  # the parts are checked

    @classmethod
    def of(cls, mpo: Form, low_rank: Form) -> Self:
        """The sum of an MPO and a low-rank matrix of the form ``svd``."""
        return cls([*mpo.cores, *low_rank.cores], replace(mpo.structure, form=cls.name))

    @property
    def terms(self) -> tuple[Form, ...]:
        """The MPO and the low-rank part."""
        return self.mpo, self.low_rank

    @property
    def bonds(self) -> tuple[int, ...]:
        """(D_0..D_n) of the MPO, then (1, r, 1)."""
        return self.mpo.bonds + self.low_rank.bonds

    def halves(self) -> tuple[Tensor, Tensor]:
        """The interleaved tensor as one column, and (1, 1)."""
        column = interleave(self.to_weight(), self.structure).reshape(-1, 1)
        return column, column.new_ones(1, 1)

    def to_matrix(self) -> Tensor:
        """(lead, outputs, inputs) without padding, in the cores' dtype."""
        matrix = self.mpo.to_matrix()
        lead, outputs, inputs = matrix.shape
        added = self.low_rank.to_matrix()[0]
        if self.structure.kind == "experts":
            return matrix + added.reshape(lead, outputs, inputs)
        return matrix + added.reshape(outputs, lead, inputs).transpose(0, 1)

    def apply_padded(self, x: Tensor) -> Tensor:
        """(n, ΠI) → (n, ΠJ), with one plan for both parts."""
        left, right = self.low_rank.cores
        rows, columns = self.structure.padding
        if rows or columns:
            left, right = pad(left, (0, 0, 0, 0, 0, rows)), pad(right, (0, 0, 0, columns))
        return contract(x, self.mpo.cores, (left, right))

    def dense_is_faster(self, batch: int) -> bool:
        """By the cost model for both parts."""
        sides, rank = (self.structure.outputs, self.structure.inputs), self.low_rank.bonds[1]
        return dense_wins(sites_of(self.mpo.cores), sides, batch, self.cores[0].is_cuda, rank)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of both parts, (n,) → (n, N_x)."""
        return self.mpo.rows(indices) + self.low_rank.rows(indices)

    def balanced(self) -> tuple[Self, list[Tensor]]:
        """Each part in its balanced gauge; no Schmidt values, since no bond cuts a sum in two."""
        cores = [core for term in self.terms for core in term.balanced()[0].cores]
        return self.with_cores(cores), []

    def summary(self) -> str:
        """Factors and bonds of the MPO, and the rank."""
        return f"{self.mpo.summary()}, low_rank={self.low_rank.bonds[1]}"
