"""What a weighted fit minimises: errors of what the layer does, not of the weight.

    f(Ŵ) = tr[ G (T − Ŵ) M (T − Ŵ)ᵀ ]

M says which inputs occur, G which outputs matter, and T is the weight that does best on the inputs x̃ that
the compressed network gives where the dense one gave x.  With C = E[x x̃ᵀ] and M = E[x̃ x̃ᵀ] (both centred
where a bias takes up the means), regularised alike by R,

    T = W (C + R)(M + R)⁻¹ = W + W (C − M)(M + R)⁻¹,

so T is W itself where x̃ = x, and also in directions that no input has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Below this share of the largest, an eigenvalue of a moment is what rounding left of zero.
_FLOOR = 1e-12
_ROUNDING = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Metric:
    """f(Ŵ) = tr[G (T − Ŵ) M (T − Ŵ)ᵀ]."""

    target: Tensor  # T (N_y, N_x) float64
    inputs: Tensor  # M + R (N_x, N_x) float64, symmetric, positive semidefinite; (N_x,) of a diagonal one
    outputs: Tensor | None = None  # G (N_y, N_y) likewise, (N_y,) of a diagonal one; None: the identity

    def value(self, matrix: Tensor) -> float:
        """f of ``matrix`` (N_y, N_x), in float64."""
        error = self.target - matrix.double()
        value = float((error * self.weighed(error)).sum())
        return math.inf if math.isnan(value) else max(0.0, value)

    def weighed(self, error: Tensor) -> Tensor:
        """G E M of E (N_y, N_x)."""
        right = error @ self.inputs if self.inputs.dim() == 2 else error * self.inputs
        return weighed(self.outputs, right)

    @cached_property
    def input_root(self) -> Tensor:
        """Some square F with F Fᵀ = M + R."""
        return _root(self.inputs)

    @cached_property
    def output_root(self) -> Tensor | None:
        """Some square F with F Fᵀ = G, (N_y,) of a diagonal one; None: the identity."""
        if self.outputs is None:
            return None
        return self.outputs.sqrt() if self.outputs.dim() == 1 else _root(self.outputs)


def weighed(outputs: Tensor | None, matrix: Tensor) -> Tensor:
    """G ``matrix`` (N_y, n), with G as in :class:`Metric`."""
    if outputs is None:
        return matrix
    return outputs[:, None] * matrix if outputs.dim() == 1 else outputs @ matrix


def make_metric(
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    cross: Tensor,
    dense_mean: Tensor,
    *,
    centred: bool,
    gamma: float,
    ridge: float,
    outputs: Tensor | None,
) -> Metric:
    """The metric of one layer from the moments of its inputs.

    Args:
        weight: W (N_y, N_x) as one matrix.
        second: E[x̃ x̃ᵀ] (N_x, N_x), not centred.
        mean: E[x̃] (N_x,).
        cross: E[x x̃ᵀ] (N_x, N_x), not centred; equal to ``second`` where only the dense network ran.
        dense_mean: E[x] (N_x,).
        centred: the layer has a bias that will be refitted, so that means cost nothing.
        gamma: share of M that is replaced by its diagonal, 0 to 1.
        ridge: added to the diagonal, in units of the mean diagonal entry of M.
        outputs: G (N_y, N_y); None for the identity.

    Returns:
        All in float64; M + R and G symmetric and without negative eigenvalues.
    """
    second, cross, weight = second.double(), cross.double(), weight.double()
    moment, joint = second, cross
    if centred:
        moment = _without_constants(second - torch.outer(mean, mean).double(), second)
        joint = cross - torch.outer(dense_mean, mean).double()
    regular = (1 - gamma) * moment
    diagonal = gamma * moment.diagonal() + ridge * moment.diagonal().mean()
    regular = semidefinite(regular + torch.diag(diagonal))
    target = weight
    if not torch.equal(cross, second) or not torch.equal(dense_mean, mean):
        target = weight + _divide(weight @ (joint - moment), regular)
    return Metric(target, regular, None if outputs is None else semidefinite(outputs.double()))


def semidefinite(matrix: Tensor) -> Tensor:
    """The symmetric part of ``matrix`` (N, N), negative eigenvalues beyond rounding set to zero."""
    matrix = (matrix + matrix.T) / 2
    if _cholesky(matrix) is not None:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    if float(values[0]) >= -_ROUNDING * len(values) * float(values[-1]):
        return matrix
    clipped = (vectors * values.clamp(min=0)) @ vectors.T
    return (clipped + clipped.T) / 2


def _without_constants(centred: Tensor, second: Tensor) -> Tensor:
    """``centred`` with zeros where a feature never varies: there the difference is rounding noise."""
    varies = (centred.diagonal() > _FLOOR * second.diagonal()).to(centred.dtype)
    return centred * torch.outer(varies, varies)


def _divide(matrix: Tensor, moment: Tensor) -> Tensor:
    """``matrix`` (m, N) times the pseudo-inverse of ``moment`` (N, N)."""
    lower = _cholesky(moment)
    if lower is not None:
        return torch.cholesky_solve(matrix.T, lower).T
    values, vectors = torch.linalg.eigh(moment)
    inside = values > _FLOOR * values[-1]
    vectors, values = vectors[:, inside], values[inside]
    return (matrix @ vectors / values) @ vectors.T


def _root(moment: Tensor) -> Tensor:
    lower = _cholesky(moment)
    if lower is not None:
        return lower
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor; None where ``matrix`` is singular up to rounding."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal().square()
    if int(failed) or float(pivots.min()) <= _FLOOR * float(pivots.max()):
        return None
    return lower
