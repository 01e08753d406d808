"""What is known of a layer's inputs and outputs, and the errors and metrics that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mpoc.calibrate.moments import Moments, merge
from mpoc.fit.metric import Metric, make_metric
from mpoc.forms.layout import to_matrix
from mpoc.structure import low_rank_structure

RIDGE = 1e-6


@dataclass(frozen=True)
class Second:
    """Second moments of inputs less the means that the fit takes up."""

    mine: Tensor  # E[x̃ x̃ᵀ] (N_x, N_x)
    cross: Tensor  # E[x x̃ᵀ]
    dense: Tensor  # E[x xᵀ]


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's inputs and outputs."""

    moments: Moments  # of the inputs of the fit
    held_out: Moments  # of others
    outputs: Tensor | None  # G (N_y, N_y) float64
    centred: bool  # whether a bias, or a norm behind the layer, takes up the mean

    @cached_property
    def seen(self) -> Second:
        """Of the inputs of the fit."""
        return self._less_means(self.moments)

    @cached_property
    def unseen(self) -> Second:
        """Of the others, less the means of the fit: those are what a bias takes up."""
        return self._less_means(self.held_out)

    def together(self) -> Evidence:
        """With nothing held out."""
        return replace(self, moments=merge(self.moments, self.held_out))

    def _less_means(self, m: Moments) -> Second:
        if not self.centred:
            return Second(m.second, m.cross, m.dense_second)
        mean, dense = self.moments.mean, self.moments.dense_mean
        return Second(
            _about(m.second, m.mean, m.mean, mean, mean),
            _about(m.cross, m.dense_mean, m.mean, dense, mean),
            _about(m.dense_second, m.dense_mean, m.dense_mean, dense, dense),
        )


def _about(second: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[(x − a)(y − b)ᵀ] from E[x yᵀ], E[x] and E[y]."""
    return second - torch.outer(left, b) - torch.outer(a, right) + torch.outer(a, b)


def one_matrix(weight: Tensor, kind: str, transposed: bool) -> Tensor:
    """A weight as the one matrix (N_y, N_x) that moments are of: of a kernel (C_out, taps·C_in)."""
    structure = low_rank_structure(kind, tuple(weight.shape), transposed)
    return to_matrix(weight, structure)[0].double()


def metric_of(matrix: Tensor, evidence: Evidence, gamma: float) -> Metric:
    """What a fit minimises; of both second moments the share γ is replaced by its diagonal.

    Both get a ridge, so that at full bond the weight is met in every direction.
    """
    m, outputs = evidence.moments, evidence.outputs
    if outputs is not None:
        diagonal = outputs.diagonal()
        outputs = (1 - gamma) * outputs + torch.diag(gamma * diagonal + RIDGE * diagonal.mean())
    return make_metric(
        matrix, m.second, m.mean, m.cross, m.dense_mean,
        centred=evidence.centred, gamma=gamma, ridge=RIDGE, outputs=outputs,
    )  # fmt: skip


def output_error(matrix: Tensor, found: Tensor, second: Second) -> float:
    """√(E‖Wx − Ŵx̃‖² / E‖Wx‖²) about the means; 0 for 0/0.

    Args:
        matrix: W (N_y, N_x).
        found: Ŵ.
        second: moments of x̃ and x.
    """
    whole = squared_error(matrix, torch.zeros_like(matrix), second, None)
    error = squared_error(matrix, found, second, None)
    return math.sqrt(error / whole) if whole > 0 else 0.0


def squared_error(matrix: Tensor, found: Tensor, second: Second, outputs: Tensor | None) -> float:
    """E of (Wx − Ŵx̃)ᵀ G (Wx − Ŵx̃) about the means; G = ``outputs``, None for the identity."""
    left, middle = matrix @ second.dense - found @ second.cross.T, matrix @ second.cross
    error = left @ matrix.T - (middle - found @ second.mine) @ found.T
    found_error = float(error.trace() if outputs is None else (error * outputs).sum())
    return math.inf if math.isnan(found_error) else max(0.0, found_error)
