"""What is known of a layer's inputs and outputs, and the errors and metrics that follow from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from mpoc.compression.calibrate.moments import Moments, merge
from mpoc.tensor_networks.fit.metric import Metric, make_metric, weighed
from mpoc.tensor_networks.forms.layout import to_matrix
from mpoc.tensor_networks.structure import low_rank_structure

_RIDGE = 1e-6
_TABLE_GAMMA = 0.02  # of G under a table


@dataclass(frozen=True)
class ErrorNorm:
    """E of (Wx − Ŵx̃)ᵀ G (Wx − Ŵx̃), about means where the fit takes them up."""

    mine: Tensor  # E[x̃ x̃ᵀ] (N_x, N_x)
    cross: Tensor  # E[x x̃ᵀ]
    dense: Tensor  # E[x xᵀ]
    outputs: Tensor | None = None  # G as in :class:`mpoc.tensor_networks.fit.metric.Metric`

    def squared(self, matrix: Tensor, found: Tensor) -> float:
        """Of Ŵ = ``found`` in the place of W = ``matrix``, both (N_y, N_x); inf in the place of NaN."""
        if self.mine is self.cross is self.dense:
            rest = matrix - found
            error = float((weighed(self.outputs, rest @ self.mine) * rest).sum())
        else:
            left = matrix @ self.dense - found @ self.cross.T
            right = matrix @ self.cross - found @ self.mine
            products = weighed(self.outputs, left) * matrix - weighed(self.outputs, right) * found
            error = float(products.sum())
        return math.inf if math.isnan(error) else max(0.0, error)

    def relative(self, matrix: Tensor, found: Tensor) -> float:
        """√ of it over that of a zero weight; 0 for 0/0."""
        whole = self.squared(matrix, torch.zeros_like(matrix))
        return math.sqrt(self.squared(matrix, found) / whole) if whole > 0 else 0.0

    def of_ranks(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Squared, of L_r R_r for every rank r; the quadratic part is Σ_{k,l<r} (Lᵀ G L)_kl (R M Rᵀ)_kl."""
        weighed_left = weighed(self.outputs, left)
        squares = (weighed_left.T @ left) * (right @ self.mine @ right.T)
        joint = ((weighed_left.T @ matrix @ self.cross) * right).sum(1)
        whole = self.squared(matrix, torch.zeros_like(matrix))
        errors = whole - 2 * joint.cumsum(0) + squares.cumsum(0).cumsum(1).diagonal()
        return errors.clamp(min=0)


@dataclass(frozen=True)
class Objective(ABC):
    """What is known of a layer's inputs and outputs.

    ``gammas`` say how far moments may be trusted: a fit chooses one by its error on held-out inputs.
    """

    moments: Moments  # of the inputs of the fit
    held_out: Moments  # of others

    gammas: ClassVar[tuple[float, ...]]
    usual_gamma: ClassVar[float]  # where none is chosen
    mpo_gamma: ClassVar[float]  # likewise, for MPOs: their fits take longer
    measured: ClassVar[tuple[float, ...]]  # parts of the weight's parameters at which errors of MPOs are told

    def together(self) -> Self:
        """With nothing held out."""
        return replace(self, moments=merge(self.moments, self.held_out))

    @property
    @abstractmethod
    def seen(self) -> ErrorNorm:
        """Of the inputs of the fit; all outputs matter alike."""

    @property
    @abstractmethod
    def unseen(self) -> ErrorNorm:
        """Of the others."""

    @property
    @abstractmethod
    def felt(self) -> ErrorNorm:
        """Of the others, outputs weighed by how much the network's output feels them."""

    @abstractmethod
    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """What a fit of W = ``matrix`` (N_y, N_x) minimises.

        Moments get a ridge, so that at full bond the weight is met in every direction.
        """

    @abstractmethod
    def whitened(self, matrix: Tensor) -> Metric:
        """The same of the dense network's inputs as they are, all outputs alike (SVD-LLM)."""

    @abstractmethod
    def shift(self, matrix: Tensor, found: Tensor) -> Tensor | None:
        """W μ − Ŵ μ̃ (N_y,), to be added to the layer's outputs; None: nothing can be."""


@dataclass(frozen=True)
class LayerObjective(Objective):
    """Of a linear map or a convolution; γ is the share of both moments that gives way to the diagonal."""

    outputs: Tensor | None  # G (N_y, N_y) float64, of gradients at the layer's output
    centred: bool  # whether a bias, or a norm behind the layer, takes up the mean

    gammas = (0.0, 0.02, 0.1, 0.3)
    usual_gamma = 0.02
    mpo_gamma = 0.1  # their fit follows chance in M more
    measured = (0.3,)

    @cached_property
    def seen(self) -> ErrorNorm:
        """Of the inputs of the fit; all outputs matter alike."""
        return self._less_means(self.moments)

    @cached_property
    def unseen(self) -> ErrorNorm:
        """Of the others, less the means of the fit: those are what a bias takes up."""
        return self._less_means(self.held_out)

    @property
    def felt(self) -> ErrorNorm:
        """Of the others, outputs weighed by how much the network's output feels them."""
        return replace(self.unseen, outputs=self.outputs)

    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """What a fit minimises."""
        m, outputs = self.moments, self.outputs
        return make_metric(
            matrix, m.second, m.mean, m.cross, m.dense_mean,
            centred=self.centred, gamma=gamma, ridge=_RIDGE,
            outputs=None if outputs is None else _shrunk(outputs, gamma),
        )  # fmt: skip

    def whitened(self, matrix: Tensor) -> Metric:
        """The same of the dense network's inputs as they are, all outputs alike."""
        m = self.moments
        return make_metric(
            matrix, m.dense_second, m.dense_mean, m.dense_second, m.dense_mean,
            centred=self.centred, gamma=0.0, ridge=_RIDGE, outputs=None,
        )  # fmt: skip

    def shift(self, matrix: Tensor, found: Tensor) -> Tensor | None:
        """What a bias takes up."""
        return matrix @ self.moments.dense_mean - found @ self.moments.mean if self.centred else None

    def _less_means(self, m: Moments) -> ErrorNorm:
        if not self.centred:
            return ErrorNorm(m.second, m.cross, m.dense_second)
        mean, dense = self.moments.mean, self.moments.dense_mean
        return ErrorNorm(
            _about(m.second, m.mean, m.mean, mean, mean),
            _about(m.cross, m.dense_mean, m.mean, dense, mean),
            _about(m.dense_second, m.dense_mean, m.dense_mean, dense, dense),
        )


@dataclass(frozen=True)
class EmbeddingObjective(Objective):
    """Of an embedding: how often each row comes, the same in the dense and the compressed network.

    As a matrix (vocabulary, width) its rows are the outputs: the metric of the outputs is the diagonal of
    their shares p, that of the inputs is G.  γ is the share of p that is spread evenly over all rows, so that
    those that did not occur are not lost; held-out texts have such rows too.
    """

    outputs: Tensor  # G (width, width) float64, of gradients at the layer's output

    gammas = (0.1, 0.3, 0.6, 0.9)
    usual_gamma = 0.1
    mpo_gamma = 0.5  # with less, the rows that did not occur are hardly kept, and others gain little
    measured = (0.05, 0.3)

    @property
    def seen(self) -> ErrorNorm:
        """Of the rows of the fit, their entries all alike."""
        return self._of(self.moments, self._alike)

    @property
    def unseen(self) -> ErrorNorm:
        """Of the others."""
        return self._of(self.held_out, self._alike)

    @property
    def felt(self) -> ErrorNorm:
        """Of the others, entries weighed by how much the network's output feels them."""
        return self._of(self.held_out, self.outputs)

    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """What a fit minimises."""
        share = self.moments.second
        spread = (1 - gamma) * share + gamma / len(share)
        return Metric(matrix, _shrunk(self.outputs, _TABLE_GAMMA), spread)

    def whitened(self, matrix: Tensor) -> Metric:
        """Rows by how often they come, entries all alike."""
        return Metric(matrix, self._alike, self.moments.second + _RIDGE / len(matrix))

    def shift(self, matrix: Tensor, found: Tensor) -> Tensor | None:
        """An embedding has no bias."""
        return None

    @property
    def _alike(self) -> Tensor:
        return torch.eye(len(self.outputs), dtype=self.outputs.dtype, device=self.outputs.device)

    def _of(self, moments: Moments, inputs: Tensor) -> ErrorNorm:
        return ErrorNorm(inputs, inputs, inputs, moments.second)


def _shrunk(moment: Tensor, gamma: float) -> Tensor:
    """With the share γ of ``moment`` (N, N) replaced by its diagonal, and a ridge."""
    diagonal = moment.diagonal()
    return (1 - gamma) * moment + torch.diag(gamma * diagonal + _RIDGE * diagonal.mean())


def _about(second: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[(x − a)(y − b)ᵀ] from E[x yᵀ], E[x] and E[y]."""
    return second - torch.outer(left, b) - torch.outer(a, right) + torch.outer(a, b)


def one_matrix(weight: Tensor, kind: str, transposed: bool) -> Tensor:
    """A weight as the one matrix (N_y, N_x) that moments are of: of a kernel (C_out, taps·C_in)."""
    structure = low_rank_structure(kind, tuple(weight.shape), transposed)
    return to_matrix(weight, structure)[0].double()
