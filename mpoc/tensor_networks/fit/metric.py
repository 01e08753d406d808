"""What a weighted fit minimises: errors of what the layer does, not of the weight.

    f(Ŵ) = tr[ G (T − Ŵ) M (T − Ŵ)ᵀ ]

M says which inputs occur, G which outputs matter, and T is the weight that does best on the inputs x̃ that
the compressed network gives where the dense one gave x.  With C = E[x x̃ᵀ] and M = E[x̃ x̃ᵀ] (both centred
where a bias takes up the means), regularised alike by R,

    T = W (C + R)(M + R)⁻¹ = W + W (C − M)(M + R)⁻¹,

so T is W itself where x̃ = x, and also in directions that no input has.

The best low-rank weight in a weighted norm, in closed form (as whitened SVD: SVD-LLM, Wang et al. 2024).

With M = F Fᵀ and G = H Hᵀ, f(Ŵ) = ‖Hᵀ (T − Ŵ) F‖², and by Eckart and Young the best Hᵀ Ŵ F of rank r is
the truncated SVD U_r S_r V_rᵀ of Hᵀ T F.  Nothing needs to be divided by F or H to come back from there:

    Ŵ = (T F V_r) S_r⁻¹ (U_rᵀ Hᵀ T).

Where M and G are regular this is the only minimiser.  Where they are not, it keeps what T does in directions
that cost nothing, as far as the rank allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    factor: Tensor | None = field(
        default=None, compare=False
    )  # of Cholesky, of ``inputs``, where it is known

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
        return _root(self.inputs) if self.factor is None else self.factor

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
    regular.diagonal().add_(gamma * moment.diagonal() + ridge * moment.diagonal().mean())
    regular, lower = _semidefinite(regular)
    target = weight
    if not torch.equal(cross, second) or not torch.equal(dense_mean, mean):
        target = weight + _divide(weight @ (joint - moment), regular, lower)
    return Metric(target, regular, None if outputs is None else semidefinite(outputs.double()), lower)


def semidefinite(matrix: Tensor) -> Tensor:
    """The symmetric part of ``matrix`` (N, N), negative eigenvalues beyond rounding set to zero."""
    return _semidefinite(matrix)[0]


def _semidefinite(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """As :func:`semidefinite`, with the lower factor of Cholesky; None where the result is singular."""
    matrix = (matrix + matrix.T) / 2
    lower = _cholesky(matrix)
    if lower is not None:
        return matrix, lower
    values, vectors = torch.linalg.eigh(matrix)
    if float(values[0]) >= -_ROUNDING * len(values) * float(values[-1]):
        return matrix, None
    clipped = (vectors * values.clamp(min=0)) @ vectors.T
    return (clipped + clipped.T) / 2, None


def _without_constants(centred: Tensor, second: Tensor) -> Tensor:
    """``centred`` with zeros where a feature never varies: there the difference is rounding noise."""
    varies = (centred.diagonal() > _FLOOR * second.diagonal()).to(centred.dtype)
    return centred * torch.outer(varies, varies)


def _divide(matrix: Tensor, moment: Tensor, lower: Tensor | None) -> Tensor:
    """``matrix`` (m, N) times the pseudo-inverse of ``moment`` (N, N), whose Cholesky factor may be known."""
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


# Singular values below this share of the largest are zero up to rounding.
_SVD_FLOOR = 1e-13


@dataclass(frozen=True)
class WeightedSVD:
    """The best weight of any rank r is ``left[:, :r] @ right[:r]``, and its f is Σ_{k≥r} values[k]²."""

    left: Tensor  # (N_y, K) float64
    values: Tensor  # (K,) float64, descending
    right: Tensor  # (K, N_x) float64; row k has the norm of left's column k

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best weight of this rank as (N_y, r) and (r, N_x) with equal, diagonal Gram matrices."""
        left, upper = torch.linalg.qr(self.left[:, :rank])
        right, lower = torch.linalg.qr(self.right[:rank].T)
        u, values, v = torch.linalg.svd(upper @ lower.T)
        root = values.sqrt()
        return left @ (u * root), (root[:, None] * v) @ right.T


def weighted_svd(metric: Metric) -> WeightedSVD:
    """The minimisers of f over all weights of rank 1, 2, … K ≤ min(N_y, N_x).

    K is the rank of the target as the metric sees it, at least 1; f at rank K is zero.
    """
    seen_inputs = metric.target @ metric.input_root  # T F
    root = metric.output_root
    root = None if root is None else root.mT if root.dim() == 2 else root
    seen_outputs = weighed(root, metric.target)  # Hᵀ T
    whitened = weighed(root, seen_inputs)
    u, values, v = torch.linalg.svd(whitened, full_matrices=False)
    count = max(1, int((values > _SVD_FLOOR * values[0]).sum()))
    u, values, v = u[:, :count], values[:count], v[:count]
    inverse = torch.where(values > 0, 1 / values, 0)
    left = u * values if root is None else seen_inputs @ v.T
    right = inverse[:, None] * (u.T @ seen_outputs)
    tiny = torch.finfo(values.dtype).tiny  # keeps 0/0 of a zero target 0
    balance = (right.norm(dim=1).clamp(min=tiny) / left.norm(dim=0).clamp(min=tiny)).sqrt()
    return WeightedSVD(left * balance, values, right / balance[:, None])
