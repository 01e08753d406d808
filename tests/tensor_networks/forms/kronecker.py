"""A form that mpoc does not have: a sum of Kronecker products, Ŵ = Σ_r A_r ⊗ B_r.

Source: Van Loan and Pitsianis 1993.  The file holds all that adding a form takes: topology, class and fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import DEFAULT_TARGET, Target, Truncation, squared_norm
from mpoc.tensor_networks.fit.tt_svd import Fit, stored_fit
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import Core, Factors, Place, Topology


class KroneckerTopology(Topology):
    """The first site, and all others together; one bond, the number of products, joins the two."""

    def cores(self, outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """(J_1, I_1, R), and (R, J_2, I_2, …)."""
        rest = [(f"{side}{k}", n) for k in range(2, len(outputs) + 1) for side, n in
                (("j", outputs[k - 1]), ("i", inputs[k - 1]))]  # fmt: skip
        first = Core(("j1", "i1", "b1"), (outputs[0], inputs[0], *bonds))
        return first, Core(("b1", *(leg for leg, _ in rest)), (*bonds, *(size for _, size in rest)))

    def bonds(self, sizes: tuple[int, ...], max_bond: int) -> tuple[int, ...]:
        """(R,)."""
        return (min(max_bond, sizes[0], math.prod(sizes[1:])),)

    def num_bonds(self, sites: int) -> int:
        """Always 1."""
        return 1

    def places(self, cores: Sequence[Core]) -> list[Place]:
        """In a row."""
        return [(2.0 * k, 0.0) for k in range(len(cores))]


class Kronecker(Form):
    """A weight as a sum of Kronecker products."""

    @property
    def bonds(self) -> tuple[int, ...]:
        """(R,)."""
        return (self.cores[0].shape[-1],)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(J_1 I_1, R) and (R, J_2 I_2 …)."""
        return self.cores[0].flatten(0, 1), self.cores[1].flatten(1)


def fit_kronecker(
    weight: Tensor, structure: Structure, truncation: Truncation, target: Target = DEFAULT_TARGET
) -> Fit:
    """The nearest sum: the truncated SVD of the weight with the first site as its rows."""
    tensor = interleave(weight, structure)
    (bond,) = structure.bonds(truncation.max_bond)
    left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    shapes = structure.core_shapes((bond,))
    cores = [(left[:, :bond] * values[:bond]).reshape(shapes[0]), right[:bond].reshape(shapes[1])]
    return stored_fit(tensor, squared_norm(tensor), Kronecker(cores, structure), target.dtype or weight.dtype)
