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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.second_moment import MixedMoment, RowMoment, Second, ShiftedMoment

# Below this share of the largest, an eigenvalue of a moment is what rounding left of zero.
_FLOOR = 1e-12
_ROUNDING = torch.finfo(torch.float64).eps


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


class _Products:
    """Products of the last weights that were asked for with the moments of an :class:`ErrorNorm`."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Tensor, ...], Any]] = {}

    def __call__(self, name: str, compute: Callable[..., Any], *given: Tensor) -> Any:
        """``compute(*given)``, or what it gave where ``name`` was last asked for with the same tensors."""
        last, known = self._known.get(name, ((), None))
        if len(last) == len(given) and all(a is b for a, b in zip(last, given, strict=True)):
            return known
        result = compute(*given)
        self._known[name] = given, result
        return result


@dataclass(frozen=True)
class ErrorNorm:
    """The mean of (Wx − Ŵx̃)ᵀ G (Wx − Ŵx̃) over rows, less the mean error where the fit corrects it."""

    compressed: Second  # M = E[x̃ x̃ᵀ] (N_x, N_x)
    cross: Second  # C = E[x x̃ᵀ]
    dense: Second  # Σ = E[x xᵀ]
    outputs: Tensor | None = None  # G as in :class:`mpoc.tensor_networks.fit.metric.Metric`
    _products: _Products = field(default_factory=_Products, compare=False, repr=False)
    _weighed: _Products = field(default_factory=_Products, compare=False, repr=False)

    def with_outputs(self, outputs: Tensor | None) -> ErrorNorm:
        """The same moments and another G."""
        return replace(self, outputs=outputs, _weighed=_Products())

    def squared(self, matrix: Tensor, approximation: Tensor) -> float:
        """The norm squared for W = ``matrix`` and its approximation Ŵ, both (N_y, N_x); NaN counts as inf.

        With Δ = W − Ŵ it is tr G [W (Σ − C − Cᵀ + M) Wᵀ + 2 W (C − M) Δᵀ + Δ M Δᵀ].
        """
        rest, moved = self._products("of difference", self._of_difference, matrix, approximation)
        error = float((weighed(self.outputs, moved) * rest).sum())
        if not self._is_of_dense:
            error += float((self._weighed_weight(matrix) * self._unreached(matrix)).sum())
        return math.inf if math.isnan(error) else max(0.0, error)

    def _of_difference(self, matrix: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
        """Δ, and 2 W (C − M) + Δ M."""
        rest = matrix - approximation
        moved = rest @ self.compressed
        return rest, moved if self._is_of_dense else moved.add_(self.moved(matrix), alpha=2)

    @property
    def _is_of_dense(self) -> bool:
        """Whether x̃ = x."""
        return self.compressed is self.cross is self.dense

    def moved(self, matrix: Tensor) -> Tensor:
        """W (C − M)."""

        def compute(weight: Tensor) -> Any:
            if isinstance(self.cross, RowMoment):  # whose values are exact enough for small differences
                return weight @ (self.cross - self.compressed)
            return self._crossed(weight) - weight @ self.compressed

        return cast(Tensor, self._products("moved", compute, matrix))

    def _seen(self, matrix: Tensor) -> Tensor:
        """W Σ."""
        return cast(Tensor, self._products("dense", lambda w: w @ self.dense, matrix))

    def _crossed(self, matrix: Tensor) -> Tensor:
        """W C."""
        return cast(Tensor, self._products("cross", lambda w: w @ self.cross, matrix))

    def _unreached(self, matrix: Tensor) -> Tensor:
        """W (Σ − C − Cᵀ + M), or what has the same trace with G Wᵀ: C there in the place of Cᵀ."""

        def compute(weight: Tensor) -> Any:
            if isinstance(self.cross, RowMoment):
                return weight @ (self.dense - self.cross.T) - self.moved(weight)
            return self._seen(weight) - self._crossed(weight) - self.moved(weight)

        return cast(Tensor, self._products("unreached", compute, matrix))

    def _weighed_weight(self, matrix: Tensor) -> Tensor:
        """G W."""
        return cast(Tensor, self._weighed("weight", lambda w: weighed(self.outputs, w), matrix))

    def whole(self, matrix: Tensor) -> float:
        """The norm squared of a zero weight, tr G W Σ Wᵀ."""

        def compute(weight: Tensor) -> float:
            return float((self._weighed_weight(weight) * self._seen(weight)).sum())

        norm: float = self._weighed("whole", compute, matrix)
        return math.inf if math.isnan(norm) else max(0.0, norm)

    def relative(self, matrix: Tensor, approximation: Tensor) -> float:
        """The norm relative to that of a zero weight; 0 for 0/0."""
        whole = self.whole(matrix)
        return math.sqrt(self.squared(matrix, approximation) / whole) if whole > 0 else 0.0

    def of_ranks(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The norm squared of Ŵ = L_r R_r for every rank r.

        Its quadratic part is Σ_{k,l<r} (Lᵀ G L)_kl (R M Rᵀ)_kl.
        """
        weighed_left = weighed(self.outputs, left)
        squares = (weighed_left.T @ left) * (right @ self.compressed @ right.T)
        seen = self._seen(matrix) if self._is_of_dense else self._crossed(matrix)
        joint = ((weighed_left.T @ seen) * right).sum(1)
        whole = self.whole(matrix)
        errors = whole - 2 * joint.cumsum(0) + squares.cumsum(0).cumsum(1).diagonal()
        return errors.clamp(min=0)


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
        second, cross = second.double(), cross.double()
        if not centred:
            return cls(second, second if same else cross)
        moment = ShiftedMoment.about(second, mean, mean, mean, mean)
        # What hardly varies beside its power is rounding noise alone
        varies = (moment.diagonal() > _FLOOR * second.diagonal()).to(moment.columns)
        moment = replace(moment, varies=None if bool(varies.all()) else varies)
        return cls(moment, moment if same else ShiftedMoment.about(cross, dense_mean, mean, dense_mean, mean))

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
        shrunk = _formed(self.second, 1 - gamma)
        shrunk.diagonal().add_(gamma * diagonal + ridge * diagonal.mean())
        regular, factor = _semidefinite(shrunk)
        target = weight
        if self.cross is not self.second:
            moved = weight @ self.cross - weight @ self.second if moved is None else moved
            target = weight + _divide(moved, regular, factor)
        return Metric(target, regular, outputs, factor, lower)


def _formed(moment: Second, factor: float) -> Tensor:
    """``factor`` times a moment as a matrix of its own."""
    if isinstance(moment, ShiftedMoment):
        return moment.scaled(factor)
    return moment.formed().mul_(factor) if isinstance(moment, MixedMoment) else factor * moment


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


def _divide(matrix: Tensor, moment: Tensor, lower: Tensor | None) -> Tensor:
    """``matrix`` (m, N) times the pseudo-inverse of ``moment`` (N, N), whose Cholesky factor may be known."""
    if lower is not None:
        half = torch.linalg.solve_triangular(lower.mT, matrix, upper=True, left=False)
        return torch.linalg.solve_triangular(lower, half, upper=False, left=False)  # copies no (N, N)
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
