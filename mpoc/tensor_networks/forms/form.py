"""What every form is: cores, and the structure that says which weight they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from mpoc.tensor_networks.forms.layout import deinterleave_matrix, from_matrix
from mpoc.tensor_networks.structure import Structure


class Form(ABC):
    """A weight as a tensor network.

    Args:
        cores: with the legs that ``structure.wiring`` names.
        structure: output and input factors, padding, the weight's own shape.
    """

    def __init__(self, cores: Sequence[Tensor], structure: Structure) -> None:
        self.cores = list(cores)
        self.structure = structure

    @property
    @abstractmethod
    def bonds(self) -> tuple[int, ...]:
        """As ``structure.wiring`` takes them."""

    @abstractmethod
    def halves(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the interleaved tensor, its first sites the rows.

        A block of its rows needs a block of the first.
        """

    def balanced(self) -> tuple[Form, list[Tensor]]:
        """The same weight in float64, in the gauge that is stored, and the Schmidt values of its bonds.

        None of either in a network with loops: it has no such gauge.
        """
        return type(self)([core.double() for core in self.cores], self.structure), []

    def to_matrix(self) -> Tensor:
        """(lead, outputs, inputs) without padding, in the cores' dtype."""
        left, right = self.halves()
        return deinterleave_matrix(left @ right, self.structure)

    @property
    def legs(self) -> list[tuple[str, ...]]:
        """The names of each core's axes: see :mod:`mpoc.tensor_networks.topology`."""
        return [core.legs for core in self.structure.wiring(self.bonds)]

    @property
    def num_parameters(self) -> int:
        """N_mpo."""
        return sum(core.numel() for core in self.cores)

    def to_weight(self) -> Tensor:
        """The dense weight in the checkpoint's own shape, in the cores' dtype.

        Of a whole map it is the nearest kernel.
        """
        return from_matrix(self.to_matrix(), self.structure)

    def spectra(self) -> list[Tensor]:
        """Schmidt values at the bonds, where each cuts the weight in two; else none."""
        return []

    def entropies(self) -> list[float]:
        """Entanglement entropies at the bonds, where each cuts the weight in two; else none."""
        return []

    def _check(self, bonds: tuple[int, ...]) -> None:
        """Compare the cores' shapes with those that ``bonds`` give.

        Raises:
            ValueError: they differ.
        """
        shapes, expected = [tuple(core.shape) for core in self.cores], self.structure.core_shapes(bonds)
        if shapes != expected:
            raise ValueError(f"cores of shapes {shapes} where a {self.structure.form} has {expected}")
