"""The objective of a layer's fit: moments of its inputs and outputs, errors and metrics made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from mpoc.compression.calibrate.moments import Moments, merge
from mpoc.tensor_networks.fit.metric import Centred, ErrorNorm, Metric, make_metric
from mpoc.tensor_networks.fit.second_moment import RowMoment, Second, ShiftedMoment
from mpoc.tensor_networks.forms.layout import to_matrix
from mpoc.tensor_networks.structure import low_rank_structure

_RIDGE = 1e-6
_FLOOR = 0.3  # of G, in units of γ and its mean diagonal
_TABLE_GAMMA = 0.02  # of G under a table


@dataclass(frozen=True)
class Objective(ABC):
    """What a fit of one layer minimises, and the errors by which it is judged.

    γ is the share of the moments that gives way to their diagonal: the less data, the larger it should be.
    A fit chooses it among ``gammas`` by the error on held-out inputs.
    """

    moments: Moments  # of the inputs of the fit
    held_out: Moments  # of held-out inputs

    gammas: ClassVar[tuple[float, ...]]
    usual_gamma: ClassVar[float]  # where γ is not chosen
    mpo_gamma: ClassVar[float]  # the γ of MPOs, whose fits take too long to choose it
    measured: ClassVar[
        tuple[float, ...]
    ]  # shares of the weight's parameters at which MPOs are fitted to know their errors

    def together(self) -> Self:
        """The same objective with the held-out inputs taken into the fit."""
        return replace(self, moments=merge(self.moments, self.held_out, formed=False))

    @property
    @abstractmethod
    def fit_error(self) -> ErrorNorm:
        """The error on the inputs of the fit; all outputs weigh the same."""

    @property
    @abstractmethod
    def held_out_error(self) -> ErrorNorm:
        """The error on held-out inputs; all outputs weigh the same."""

    @property
    @abstractmethod
    def output_weighted_error(self) -> ErrorNorm:
        """The error on held-out inputs, outputs weighted by G, the moment of gradients there."""

    @abstractmethod
    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """The metric that a fit of W = ``matrix`` (N_y, N_x) minimises.

        Moments get a ridge, so that at full bond the weight is met in every direction.
        """

    @abstractmethod
    def whitened(self, matrix: Tensor) -> Metric:
        """The metric of the dense network's inputs, γ = 0 and all outputs of one weight (SVD-LLM)."""

    @abstractmethod
    def shift(self, matrix: Tensor, approximation: Tensor) -> Tensor | None:
        """W μ − Ŵ μ̃ (N_y,), to be added to the layer's outputs; None where nothing can correct the mean."""


@dataclass(frozen=True)
class LayerObjective(Objective):
    """The objective of a linear map or a convolution; γ is taken of both moments."""

    outputs: Tensor | None  # G (N_y, N_y) float64, of gradients at the layer's output
    centred: bool  # whether a bias, or a norm behind the layer, corrects the mean

    gammas = (0.0, 0.02, 0.1, 0.3)
    usual_gamma = 0.02
    mpo_gamma = 0.1  # an MPO's fit overfits M more
    measured = (0.3,)

    @cached_property
    def fit_error(self) -> ErrorNorm:
        """The error on the inputs of the fit."""
        return self._of_fit(None)

    def _of_fit(self, outputs: Tensor | None) -> ErrorNorm:
        moments, known = self.moments, self._centred
        if known.cross is known.second:
            return ErrorNorm(known.second, known.second, known.second, outputs)
        dense = moments.dense_second
        if self.centred:
            dense = _about(dense, *[moments.dense_mean] * 4)
        return ErrorNorm(known.second, known.cross, dense, outputs)

    @cached_property
    def held_out_error(self) -> ErrorNorm:
        """The error on held-out inputs, less the means of the fit, which are what a bias corrects."""
        return self._less_means(self.held_out)

    @cached_property
    def output_weighted_error(self) -> ErrorNorm:
        """The error on held-out inputs, outputs weighted by G."""
        return self.held_out_error.with_outputs(self.outputs)

    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """The metric that a fit minimises."""
        outputs = None if self.outputs is None else _shrunk(self.outputs, gamma)
        moved = None if isinstance(self.moments.second, RowMoment) else self.fit_error.moved(matrix)
        return self._centred.metric(matrix, gamma, _RIDGE, outputs, moved)

    @cached_property
    def _centred(self) -> Centred:
        m = self.moments
        return Centred.of(m.second, m.mean, m.cross, m.dense_mean, self.centred)

    def whitened(self, matrix: Tensor) -> Metric:
        """The metric of the dense network's inputs, all outputs of one weight."""
        m = self.moments
        return make_metric(
            matrix, m.dense_second, m.dense_mean, m.dense_second, m.dense_mean,
            centred=self.centred, gamma=0.0, ridge=_RIDGE, outputs=None,
        )  # fmt: skip

    def shift(self, matrix: Tensor, approximation: Tensor) -> Tensor | None:
        """The correction of the mean."""
        return matrix @ self.moments.dense_mean - approximation @ self.moments.mean if self.centred else None

    def _less_means(self, m: Moments) -> ErrorNorm:
        if not self.centred:
            return ErrorNorm(m.second, m.cross, m.dense_second)
        mean, dense = self.moments.mean, self.moments.dense_mean
        if m.cross is m.second is m.dense_second:
            second = _about(m.second, m.mean, m.mean, mean, mean)
            return ErrorNorm(second, second, second)
        return ErrorNorm(
            _about(m.second, m.mean, m.mean, mean, mean),
            _about(m.cross, m.dense_mean, m.mean, dense, mean),
            _about(m.dense_second, m.dense_mean, m.dense_mean, dense, dense),
        )


@dataclass(frozen=True)
class GroupedObjective(LayerObjective):
    """The objective of a convolution with groups, depthwise ones among them.

    One moment of inputs stands for all groups: the mean of theirs, each at the same power.  The powers weigh
    the outputs, whose metric is diagonal.
    """

    powers: Tensor  # (N_y,) of the inputs that each output sees
    group_means: tuple[Tensor, Tensor]  # (groups, N_x): of inputs in the compressed network, in the dense one

    @classmethod
    def of(cls, moments: Moments, held_out: Moments, outputs: Tensor | int, centred: bool) -> Self:
        """The objective of a layer whose moments have an axis of groups in front.

        Args:
            moments: of the inputs of the fit.
            held_out: of held-out inputs.
            outputs: G (N_y, N_y), or N_y where it is not known.
            centred: as of :class:`LayerObjective`.
        """
        zero = torch.zeros_like(moments.mean)
        means = (moments.mean, moments.dense_mean) if centred else (zero, zero)
        dense = _grouped_about(
            moments.dense_second, moments.dense_mean, moments.dense_mean, means[1], means[1]
        )
        power = dense.diagonal(dim1=-2, dim2=-1).mean(-1)
        power = power.clamp(min=1e-12 * float(power.max()) or 1.0)
        count = outputs if isinstance(outputs, int) else len(outputs)
        powers = power.repeat_interleave(count // len(power))
        metric = powers if isinstance(outputs, int) else powers * outputs.diagonal()
        seen, unseen = _as_one_group(moments, means, power), _as_one_group(held_out, means, power)
        return cls(seen, unseen, torch.diag(metric), centred, powers, means)

    @property
    def fit_error(self) -> ErrorNorm:
        """The error on the inputs of the fit."""
        return self._of_fit(self.powers)

    @property
    def held_out_error(self) -> ErrorNorm:
        """The error on held-out inputs."""
        return self._less_means(self.held_out).with_outputs(self.powers)

    def shift(self, matrix: Tensor, approximation: Tensor) -> Tensor | None:
        """The correction of the mean, from each group's own."""
        if not self.centred:
            return None
        groups = len(self.group_means[0])
        apart = (one.unflatten(0, (groups, -1)) for one in (approximation, matrix))
        ours, dense = (
            (rows @ mean[..., None]).flatten() for rows, mean in zip(apart, self.group_means, strict=True)
        )
        return dense - ours


def _as_one_group(moments: Moments, means: tuple[Tensor, Tensor], power: Tensor) -> Moments:
    """The mean of all groups' moments about the means of the fit, each at power 1."""
    mean, dense = means
    products = (
        _grouped_about(moments.second, moments.mean, moments.mean, mean, mean),
        _grouped_about(moments.cross, moments.dense_mean, moments.mean, dense, mean),
        _grouped_about(moments.dense_second, moments.dense_mean, moments.dense_mean, dense, dense),
    )
    second, cross, dense_second = ((one / power[:, None, None]).mean(0) for one in products)
    zero = torch.zeros_like(mean[0])
    return Moments(moments.rows, zero, second, zero, cross, dense_second)


def _grouped_about(second: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[(x − a)(y − b)ᵀ] of each group (groups, N_x, N_x)."""
    return second - left[..., None] * b[:, None] - a[..., None] * right[:, None] + a[..., None] * b[:, None]


@dataclass(frozen=True)
class EmbeddingObjective(Objective):
    """The objective of an embedding: how often each row occurs, the same in both networks.

    As a matrix (vocabulary, width) its rows are the outputs: the metric of the outputs is the diagonal of
    their shares p, that of the inputs is G.  γ is the share of p that is spread evenly over all rows, so that
    rows that did not occur are kept too: held-out texts have such rows.
    """

    outputs: Tensor  # G (width, width) float64, of gradients at the layer's output

    gammas = (0.1, 0.3, 0.6, 0.9)
    usual_gamma = 0.1
    mpo_gamma = 0.5  # with less, the rows that did not occur are hardly kept, and others gain little
    measured = (0.05, 0.3)

    @property
    def fit_error(self) -> ErrorNorm:
        """The error on the rows of the fit, all entries of one weight."""
        return self._of(self.moments, self._alike)

    @property
    def held_out_error(self) -> ErrorNorm:
        """The error on held-out rows, all entries of one weight."""
        return self._of(self.held_out, self._alike)

    @property
    def output_weighted_error(self) -> ErrorNorm:
        """The error on held-out rows, entries weighted by G."""
        return self._of(self.held_out, self.outputs)

    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """The metric that a fit minimises."""
        share = self.moments.second
        spread = (1 - gamma) * share + gamma / len(share)
        return Metric(matrix, _shrunk(self.outputs, _TABLE_GAMMA), spread)

    def whitened(self, matrix: Tensor) -> Metric:
        """The metric of rows by how often they occur, all entries of one weight."""
        return Metric(matrix, self._alike, self.moments.second + _RIDGE / len(matrix))

    def shift(self, matrix: Tensor, approximation: Tensor) -> Tensor | None:
        """An embedding has no bias."""
        return None

    @property
    def _alike(self) -> Tensor:
        return torch.eye(len(self.outputs), dtype=self.outputs.dtype, device=self.outputs.device)

    def _of(self, moments: Moments, inputs: Tensor) -> ErrorNorm:
        return ErrorNorm(inputs, inputs, inputs, moments.second)


@dataclass(frozen=True)
class TransposedObjective(EmbeddingObjective):
    """The objective of a transposed convolution, whose kernel as a matrix is (C_in, taps · C_out).

    As with a table, inputs choose its rows.  The metric of that side is the moment of inputs; on the other
    side it is G, the moment of gradients in the patch of outputs around a position.
    """

    gammas = (0.0, 0.02, 0.1, 0.3)
    usual_gamma = 0.02
    mpo_gamma = 0.1

    def metric(self, matrix: Tensor, gamma: float) -> Metric:
        """The metric that a fit minimises."""
        return Metric(matrix, _shrunk(self.outputs, gamma), _shrunk(self.moments.second, gamma))

    def whitened(self, matrix: Tensor) -> Metric:
        """The metric of the inputs, all outputs of one weight."""
        return Metric(matrix, self._alike, _shrunk(self.moments.second, 0.0))


def _shrunk(moment: Tensor, gamma: float) -> Tensor:
    """``moment`` (N, N) with the share γ of it replaced by its diagonal, and a floor of the mean's size.

    Without the floor a fit moves its errors to outputs without gradients, which later layers may yet see.
    """
    diagonal, changed = moment.diagonal(), (1 - gamma) * moment
    changed.diagonal().add_(gamma * diagonal + (_FLOOR * gamma + _RIDGE) * diagonal.mean())
    return changed


def _about(second: Second, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Second:
    """E[(x − a)(y − b)ᵀ] from E[x yᵀ], E[x] and E[y]."""
    if isinstance(second, RowMoment):
        return second.about(a, b)
    return ShiftedMoment.about(second, left, right, a, b)


def one_matrix(weight: Tensor, kind: str, transposed: bool) -> Tensor:
    """A weight as the matrix (N_y, N_x) that multiplies rows; of a kernel (C_out, taps·C_in)."""
    structure = low_rank_structure(kind, tuple(weight.shape), transposed)
    return to_matrix(weight, structure)[0].double()
