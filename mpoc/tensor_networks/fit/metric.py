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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Below this share of the largest, an eigenvalue of a moment is what rounding left of zero.
_FLOOR = 1e-12
_ROUNDING = torch.finfo(torch.float64).eps
_PANEL = 256  # rows that are worked with in float64 at a time


@dataclass(frozen=True)
class CentredRows:
    """Rows x_k − c, c the same for all.

    Products are formed in the dtype of the values, and have that of the other matrix.
    """

    values: Tensor  # (n, N) float32 or float64
    centre: Tensor  # c (N,) float64

    def along(self, matrix: Tensor) -> Tensor:
        """Products with all rows: (m, N) → (m, n)."""
        products = (matrix.to(self.values.dtype) @ self.values.T).to(matrix.dtype)
        return products - matrix @ self.centre.to(matrix.dtype)[:, None]

    def back(self, weights: Tensor) -> Tensor:
        """Weighted sums of all rows: (m, n) → (m, N)."""
        sums = (weights.to(self.values.dtype) @ self.values).to(weights.dtype)
        return sums - torch.outer(weights.sum(1), self.centre.to(weights.dtype))

    def about(self, mean: Tensor) -> CentredRows:
        """The same rows less ``mean`` (N,)."""
        return replace(self, centre=self.centre + mean)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some of the rows at a time (m, N), in float64, and which."""
        for k in range(0, len(self.values), _PANEL):
            part = slice(k, k + _PANEL)
            yield part, self.values[part].double() - self.centre


@dataclass(frozen=True)
class RowMoment:
    """A second moment (N, N) as the rows that it is made of, fewer than N: S (Σ_k w_k a_k b_kᵀ + diag d) S.

    It is multiplied by and never formed.  S is a symmetric matrix that is given as what it does to rows.
    """

    left: CentredRows  # a
    right: CentredRows  # b; the same object where the moment is symmetric
    weights: Tensor  # w (n,) float64
    ridge: Tensor | None = None  # d (N,) float64; None: zero
    outer: Callable[[Tensor], Tensor] | None = None  # (m, N) → (m, N) @ S; None: S is the identity

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return len(self.left.centre), len(self.left.centre)

    @property
    def T(self) -> RowMoment:  # noqa: N802
        """The transpose."""
        return replace(self, left=self.right, right=self.left)

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        """``matrix`` (m, N) times the moment, in the dtype of ``matrix``."""
        given = matrix if self.outer is None else self.outer(matrix)
        result = self.right.back(self.left.along(given) * self.weights.to(given.dtype))
        if self.ridge is not None:
            result.addcmul_(given, self.ridge.to(given.dtype))
        return result if self.outer is None else self.outer(result)

    def __sub__(self, other: RowMoment) -> RowMoment:
        """The difference to a moment of the same rows on the right: that of the rows on the left."""
        assert self.right.values is other.right.values, "moments of the same rows"
        rest = self.left.values - other.left.values
        return replace(self, left=CentredRows(rest, self.left.centre - other.left.centre))

    def about(self, left: Tensor, right: Tensor) -> RowMoment:
        """The moment of rows less these means (N,)."""
        first = self.left.about(left)
        return replace(self, left=first, right=first if self.right is self.left else self.right.about(right))

    def diagonal(self) -> Tensor:
        """(N,) float64, where S is the identity."""
        total = torch.zeros_like(self.left.centre) if self.ridge is None else self.ridge.clone()
        for (part, a), (_, b) in zip(self.left.blocks(), self.right.blocks(), strict=True):
            total += self.weights[part] @ (a * b)
        return total

    def divided(self, matrix: Tensor, moment: RowMoment) -> Tensor:
        """``matrix`` (m, N) times this moment and the inverse of another, Σ_k v_k b_k b_kᵀ + diag d.

        By the identity (Aᵀ B)(Bᵀ B + D)⁻¹ = Aᵀ (1 + B D⁻¹ Bᵀ)⁻¹ B D⁻¹, where nothing cancels.
        """
        assert moment.ridge is not None
        inverse = 1 / moment.ridge.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
        roots = moment.weights.sqrt()
        gram = torch.eye(len(roots), dtype=torch.float64, device=roots.device)
        for here, rows in self.right.blocks():
            scaled = rows * inverse
            for there, others in self.right.blocks():
                if there.start <= here.start:
                    gram[here, there] += roots[here, None] * (scaled @ others.T) * roots[there]
        seen = self.left.along(matrix) * (self.weights / roots)
        return self.right.back(torch.cholesky_solve(seen.T, torch.linalg.cholesky(gram)).T * roots) * inverse

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> RowMoment:
        """The moment of rows changed by a linear map, (…, N) → (…, N'), that a diagonal goes through too."""
        first = CentredRows(change(self.left.values), change(self.left.centre))
        ridge = None if self.ridge is None else change(self.ridge)
        return replace(self, left=first, right=first, ridge=ridge)

    def formed(self) -> Tensor:
        """The moment as a matrix (N, N) float64, where S is the identity."""
        # What rows are given in is exact enough for sums of centred ones, and of no others
        a, b = (one.values - one.centre.to(one.values.dtype) for one in (self.left, self.right))
        weighted, symmetric = b * self.weights.to(b.dtype)[:, None], self.left is self.right
        total = a.new_empty(self.shape, dtype=torch.float64)
        for k in range(0, len(total), _PANEL):
            panel = slice(k, k + _PANEL)
            there = slice(k if symmetric else 0, None)
            total[panel, there] = a[:, panel].T @ weighted[:, there]
        if symmetric:
            mirror(total)
        if self.ridge is not None:
            total.diagonal().add_(self.ridge)
        return total


def mirror(matrix: Tensor) -> None:
    """Make (…, N, N) symmetric, in place: what is below the diagonal becomes what is above it."""
    for k in range(0, matrix.shape[-1], _PANEL):
        panel, behind = slice(k, k + _PANEL), slice(k + _PANEL, None)
        square = matrix[..., panel, panel].triu()
        matrix[..., panel, panel] = square + square.triu(1).mT
        matrix[..., behind, panel] = matrix[..., panel, behind].mT


# A matrix (N, N), the diagonal (N,) of one, or a RowMoment; what can work with one of them alone says so.
Second: TypeAlias = Any


@dataclass(frozen=True)
class Metric:
    """f(Ŵ) = tr[G (T − Ŵ) M (T − Ŵ)ᵀ]."""

    target: Tensor  # T (N_y, N_x) float64
    # M + R (N_x, N_x), symmetric, positive semidefinite: float64, (N_x,) of a diagonal one; or its rows
    inputs: Second
    outputs: Tensor | None = None  # G (N_y, N_y) likewise, (N_y,) of a diagonal one; None: the identity
    # Lower factors of Cholesky, where they are known: of ``inputs`` and of ``outputs``
    factor: Tensor | None = field(default=None, compare=False)
    output_factor: Tensor | None = field(default=None, compare=False)

    def value(self, matrix: Tensor) -> float:
        """f of ``matrix`` (N_y, N_x), in float64."""
        error = self.target - matrix.double()
        value = float((error * self.weighed(error)).sum())
        return math.inf if math.isnan(value) else max(0.0, value)

    def weighed(self, error: Tensor) -> Tensor:
        """G E M of E (N_y, N_x)."""
        if isinstance(self.inputs, Tensor) and self.inputs.dim() == 1:
            return weighed(self.outputs, error * self.inputs)
        right: Tensor = error @ self.inputs
        return weighed(self.outputs, right)

    def weighed_error(self, error: Tensor) -> tuple[float, Tensor]:
        """f of the weight that leaves the error E (N_y, N_x), and G E M; the gradient of f is -2 G E M."""
        product = self.weighed(error)
        return float((error * product).sum(dtype=torch.float64)), product

    @cached_property
    def input_root(self) -> Tensor:
        """Some square F with F Fᵀ = M + R."""
        formed = self.inputs if isinstance(self.inputs, Tensor) else self.inputs.formed()
        return _root(formed) if self.input_lower is None else self.input_lower

    @cached_property
    def input_lower(self) -> Tensor | None:
        """The lower triangular F with F Fᵀ = M + R; None where that is singular or given as rows."""
        known = self.factor is not None or not isinstance(self.inputs, Tensor)
        return self.factor if known else _cholesky(self.inputs)

    @cached_property
    def output_root(self) -> Tensor | None:
        """Some square F with F Fᵀ = G, (N_y,) of a diagonal one; None: the identity."""
        if self.outputs is None:
            return None
        if self.outputs.dim() == 1:
            return self.outputs.sqrt()
        return _root(self.outputs) if self.output_lower is None else self.output_lower

    @cached_property
    def output_lower(self) -> Tensor | None:
        """The lower triangular F with F Fᵀ = G; None where that is singular."""
        assert self.outputs is not None
        return _cholesky(self.outputs) if self.output_factor is None else self.output_factor


def weighed(outputs: Tensor | None, matrix: Tensor) -> Tensor:
    """G ``matrix`` (N_y, n), with G as in :class:`Metric`."""
    if outputs is None:
        return matrix
    return outputs[:, None] * matrix if outputs.dim() == 1 else outputs @ matrix


@dataclass(frozen=True)
class Centred:
    """Second moments of one layer's inputs about their means, as fits for any γ take them."""

    second: Second  # M (N_x, N_x) float64, symmetric
    cross: Second  # C (N_x, N_x) float64; the same object as ``second`` where x̃ = x

    @classmethod
    def of(
        cls, second: Second, mean: Tensor, cross: Second, dense_mean: Tensor, centred: bool = True
    ) -> Centred:
        """Those of E[x̃ x̃ᵀ], E[x̃], E[x x̃ᵀ] and E[x].

        Args:
            second: (N_x, N_x).
            mean: (N_x,).
            cross: (N_x, N_x); equal to ``second`` where only the dense network ran.
            dense_mean: (N_x,).
            centred: whether the layer has a bias that will be refitted, so that means cost nothing.
        """
        same = cross is second or (isinstance(cross, Tensor) and torch.equal(cross, second))
        same &= torch.equal(dense_mean, mean)
        if isinstance(second, RowMoment):
            assert isinstance(cross, RowMoment), "both are of the same rows"
            if centred:
                second, cross = second.about(mean, mean), cross.about(dense_mean, mean)
            return cls(second, second if same else cross)
        moment = (second + second.T).double().div_(2)  # in place from here on: wide layers have large ones
        if centred:
            powers = moment.diagonal().clone()
            columns, rows = _rank_two(mean, mean, mean, mean)
            moment.addmm_(columns.to(moment), rows.to(moment), alpha=-1)
            _clear_constants(moment, powers)
        if same:
            return cls(moment, moment)
        joint = cross.double()
        return cls(moment, about(joint, dense_mean, mean, dense_mean, mean) if centred else joint)

    def metric(
        self,
        weight: Tensor,
        gamma: float,
        ridge: float,
        outputs: Tensor | None,
        moved: Tensor | None = None,
    ) -> Metric:
        """The metric of W = ``weight`` (N_y, N_x).

        Args:
            weight: float64.
            gamma: share of M that is replaced by its diagonal, 0 to 1.
            ridge: added to the diagonal, in units of the mean diagonal entry of M.
            outputs: G (N_y, N_y); None for the identity.
            moved: W (C − M) (N_y, N_x) where it is known.

        Returns:
            All in float64; M + R and G symmetric and without negative eigenvalues.
        """
        outputs, lower = (None, None) if outputs is None else _semidefinite(outputs.double())
        if isinstance(self.second, RowMoment):
            of_rows = _of_rows(weight, self.second, self.cross, gamma, ridge)
            return Metric(*of_rows, outputs, output_factor=lower)
        diagonal = self.second.diagonal()
        shrunk = (1 - gamma) * self.second
        shrunk.diagonal().add_(gamma * diagonal + ridge * diagonal.mean())
        regular, factor = _semidefinite(shrunk)
        target = weight
        if self.cross is not self.second:
            moved = weight @ (self.cross - self.second) if moved is None else moved
            target = weight + _divide(moved, regular, factor)
        return Metric(target, regular, outputs, factor, lower)


def make_metric(
    weight: Tensor,
    second: Second,
    mean: Tensor,
    cross: Second,
    dense_mean: Tensor,
    *,
    centred: bool,
    gamma: float,
    ridge: float,
    outputs: Tensor | None,
) -> Metric:
    """The metric of one layer from the moments of its inputs, as :class:`Centred` takes and makes them."""
    moments = Centred.of(second, mean, cross, dense_mean, centred)
    return moments.metric(weight.double(), gamma, ridge, outputs)


def about(second: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[(x − a)(y − b)ᵀ] (N, N) from E[x yᵀ], E[x], E[y], and a and b (N,); in the dtype of E[x yᵀ]."""
    columns, rows = _rank_two(left, right, a, b)
    return torch.addmm(second, columns.to(second), rows.to(second), alpha=-1)


def _rank_two(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2) and (2, N), whose product is E[x yᵀ] − E[(x − a)(y − b)ᵀ]."""
    return torch.stack([left, a], 1), torch.stack([b, right - b])


def _of_rows(
    weight: Tensor, moment: RowMoment, joint: RowMoment, gamma: float, ridge: float
) -> tuple[Tensor, RowMoment]:
    """The target and M + R from rows about their means."""
    diagonal = moment.diagonal()
    regular = replace(
        moment, weights=(1 - gamma) * moment.weights, ridge=gamma * diagonal + ridge * diagonal.mean()
    )
    if joint.left.values is moment.left.values:
        return weight, regular
    return weight + (joint - moment).divided(weight, regular), regular


def semidefinite(matrix: Tensor) -> Tensor:
    """The symmetric part of ``matrix`` (N, N), negative eigenvalues beyond rounding set to zero."""
    return _semidefinite((matrix + matrix.T) / 2)[0]


def _semidefinite(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of a symmetric matrix, with the lower factor of Cholesky; None where it is singular."""
    lower = _cholesky(matrix)
    if lower is not None:
        return matrix, lower
    values, vectors = torch.linalg.eigh(matrix)
    if float(values[0]) >= -_ROUNDING * len(values) * float(values[-1]):
        return matrix, None
    clipped = (vectors * values.clamp(min=0)) @ vectors.T
    return (clipped + clipped.T) / 2, None


def _clear_constants(centred: Tensor, powers: Tensor) -> None:
    """Set to zero, in place, features of these powers that never vary: there is only rounding noise."""
    varies = (centred.diagonal() > _FLOOR * powers).to(centred.dtype)
    centred.mul_(varies[:, None]).mul_(varies)


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
