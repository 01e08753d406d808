"""The base class of all forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor
from torch.nn.functional import pad

from mpoc.tensor_networks.forms.layout import deinterleave_matrix, from_matrix
from mpoc.tensor_networks.structure import Structure


class Form(ABC):
    """A weight as a tensor network.

    Args:
        cores: tensors of the shapes that ``structure.core_shapes`` gives at some bonds.
        structure: the weight's shape, factors and padding.
        check: compare the cores with the structure.

    Raises:
        ValueError: the cores do not have the structure's factors, or bonds do not meet.
    """

    def __init__(self, cores: Sequence[Tensor], structure: Structure, check: bool = True) -> None:
        self.cores = list(cores)
        self.structure = structure
        if check:
            self.check()

    @property
    @abstractmethod
    def bonds(self) -> tuple[int, ...]:
        """The bond dimensions in the order of ``structure.bonds``."""

    @abstractmethod
    def halves(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the interleaved tensor (J_1 I_1, …), with its first sites as rows.

        A block of rows of the product needs only the same rows of the first matrix.
        """

    def check(self) -> None:
        """Compare the shapes of the cores with those that their bonds give.

        Raises:
            ValueError: they differ.
        """
        shapes, expected = [tuple(core.shape) for core in self.cores], self.structure.core_shapes(self.bonds)
        if shapes != expected:
            raise ValueError(f"cores of shapes {shapes} where a {self.structure.form} has {expected}")

    def with_cores(self, cores: Sequence[Tensor]) -> Self:
        """The same form and structure with other cores."""
        return type(self)(cores, self.structure)

    def double(self) -> Self:
        """The same form with cores in float64."""
        return self.with_cores([core.double() for core in self.cores])

    @property
    def terms(self) -> tuple[Form, ...]:
        """The terms of a sum; for any other form, the form itself."""
        return (self,)

    @property
    def legs(self) -> list[tuple[str, ...]]:
        """The names of each core's axes: see :mod:`mpoc.tensor_networks.topology`."""
        return [core.legs for core in self.structure.cores(self.bonds)]

    @property
    def num_parameters(self) -> int:
        """N_mpo: the number of parameters in the cores."""
        return sum(core.numel() for core in self.cores)

    def to_matrix(self) -> Tensor:
        """(lead, outputs, inputs) without padding, in the cores' dtype."""
        left, right = self.halves()
        return deinterleave_matrix(left @ right, self.structure)

    def to_weight(self) -> Tensor:
        """The dense weight in the checkpoint's shape and the cores' dtype; a whole map's nearest kernel."""
        return from_matrix(self.to_matrix(), self.structure)

    def apply(self, x: Tensor) -> Tensor:
        """Ŵx for every vector of a batch, (n, N_x) → (n, N_y); the lead must be 1."""
        structure = self.structure
        rows, columns = structure.padding
        y = self.apply_padded(pad(x, (0, columns)) if columns else x)
        return y[:, : structure.outputs] if rows else y

    def apply_padded(self, x: Tensor) -> Tensor:
        """(n, ΠI) → (n, ΠJ). A form overrides this if there is a cheaper way than the dense matrix."""
        rows, columns = self.structure.padding
        return x @ pad(self.to_matrix()[0], (0, columns, 0, rows)).T

    def dense_is_faster(self, batch: int) -> bool:
        """Whether a product with the dense matrix, once it is built, takes less time than :meth:`apply`."""
        return True

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the matrix, (n,) → (n, N_x). A form overrides this if the matrix need not be built."""
        return self.to_matrix()[0][indices]

    def balanced(self) -> tuple[Self, list[Tensor]]:
        """The same weight in float64 in the stored gauge, and the Schmidt values of its bonds.

        Here, for a network with loops: the cores in float64 and no values.
        """
        return self.double(), []

    def spectra(self) -> list[Tensor]:
        """Schmidt values at each bond that cuts the weight in two, float64, descending."""
        return []

    def entropies(self) -> list[float]:
        """Entanglement entropy S = −Σ p ln p, p = s²/Σs², at each bond that cuts the weight in two."""
        return []

    def summary(self) -> str:
        """Factors and bonds in one line, as ``repr`` of a layer shows them."""
        outputs, inputs = self.structure.output_factors, self.structure.input_factors
        return f"outputs={outputs}, inputs={inputs}, bonds={self.bonds}"


def form_of(cores: Sequence[Tensor], structure: Structure, check: bool = True) -> Form:
    """Make the form that the structure names.

    Raises:
        ValueError: the cores do not fit the structure.
    """
    return structure.info.form_class(cores, structure, check)
