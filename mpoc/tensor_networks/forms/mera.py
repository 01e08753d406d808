"""The MERA (multi-scale entanglement renormalisation ansatz) as an operator: Hallam et al. 2017.

Inputs enter at the bottom, pass disentanglers and isometries level by level, and an output leaves at every
isometry.  Cores, legs and order are those of :func:`mpoc.tensor_networks.topology.mera`.  All cores are
free: nothing holds isometries to be isometric once they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from mpoc.tensor_networks.forms.contraction import contract_all
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import mera


class Mera(Form):
    """A weight as a binary MERA.

    Args:
        cores: (upper two legs, lower two legs) each, in the order in which they are applied.
        structure: its network is ``mera``.

    Raises:
        ValueError: the cores do not have the structure's factors, or bonds differ.
    """

    def __init__(self, cores: Sequence[Tensor], structure: Structure) -> None:
        super().__init__(cores, structure)
        self._check(self.bonds)

    @property
    def bonds(self) -> tuple[int, ...]:
        """(D,), the dimension of every bond."""
        sides = self.structure.output_factors, self.structure.input_factors
        return (bond_of(*sides, tuple(tuple(core.shape) for core in self.cores)),)

    def balanced(self) -> tuple[Mera, list[Tensor]]:
        """The same weight in float64 with cores of equal norms; no Schmidt values: see :class:`Form`."""
        cores = [core.double() for core in self.cores]
        norms = [float(core.norm()) for core in cores]
        if all(norms):
            mean = math.exp(math.fsum(map(math.log, norms)) / len(norms))
            cores = [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]
        return Mera(cores, self.structure), []

    def halves(self) -> tuple[Tensor, Tensor]:
        """The interleaved tensor as one column, and (1, 1)."""
        sites = range(1, len(self.structure.site_sizes) + 1)
        tensor = self.contracted([leg for k in sites for leg in (f"j{k}", f"i{k}")])
        return tensor.reshape(-1, 1), tensor.new_ones(1, 1)

    def contracted(self, legs: Sequence[str]) -> Tensor:
        """All cores contracted to one tensor with these legs, j_1, i_1 and so on, in this order."""
        return contract_all(self.cores, self.legs, tuple(legs))


@cache
def bond_of(outputs: tuple[int, ...], inputs: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
    """The dimension of all bonds at which cores have these shapes; 1 where there is none."""
    sizes = sorted({1, *(size for shape in shapes for size in shape)})
    fits = (size for size in sizes if tuple(core.shape for core in mera(outputs, inputs, size)) == shapes)
    return next(fits, 1)
