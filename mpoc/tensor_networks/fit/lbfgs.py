"""Minimise f over all cores of a form, or of a sum, with L-BFGS (Nocedal & Wright 2006, algorithm 7.4).

One application of Ŵ ↦ G (T − Ŵ) M gives the gradient for every core at once. Alternating least squares needs
several for each core, and many sweeps if neighbouring cores depend on each other. Measured on a transformer's
layers at equal numbers of applications, L-BFGS reaches a lower f than one-site ALS, with exact solves or a
few conjugate gradients each, and than Gauss-Newton steps.

The metric should be near the identity (:mod:`mpoc.tensor_networks.fit.whitening`). The curvature of a core in
a chain or a tree is then the product of the Gram matrices of everything beyond each of its bonds. The block
preconditioner divides by them, which makes steps independent of the gauge. A step that does not lower f is
shortened, so f never rises.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.fit.whitening import BesideLowRank
from mpoc.tensor_networks.forms.contraction import Legs, along
from mpoc.tensor_networks.forms.form import Form

# Directions of a bond below this share of its mean weight are not scaled up further.
_FLOOR = 1e-4

_MEMORY = 10
_SHORTENINGS = 6


CorePosition = tuple[int, int]  # core, axis


def inverse_grams(cores: Sequence[Tensor], legs: Sequence[Legs]) -> list[dict[int, Tensor]]:
    """For every core and each axis with a bond, the inverse Gram matrix of everything beyond that bond.

    Empty if bonds close a loop, since the environment of a core is then not a product of such matrices.
    """
    places: dict[str, list[CorePosition]] = defaultdict(list)
    for k, names in enumerate(legs):
        for axis, name in enumerate(names):
            places[name].append((k, axis))
    bonds = [ends for ends in places.values() if len(ends) == 2]
    if len(bonds) != len(cores) - 1:
        return [{} for _ in cores]
    beyond = {here: there for ends in bonds for here, there in (ends, ends[::-1])}
    grams: dict[CorePosition, Tensor] = {}
    inverses: list[dict[int, Tensor]] = [{} for _ in cores]
    for (k, axis), there in beyond.items():
        inverses[k][axis] = _inverse(_gram(cores, there, beyond, grams))
    return inverses


def _gram(
    cores: Sequence[Tensor],
    place: CorePosition,
    beyond: dict[CorePosition, CorePosition],
    known: dict[CorePosition, Tensor],
) -> Tensor:
    """Gram matrix over one axis of a core, together with everything attached to its other axes."""
    if place not in known:
        k, axis = place
        weighed = cores[k]
        for other in range(weighed.dim()):
            if other != axis and (k, other) in beyond:
                weighed = along(weighed, other, _gram(cores, beyond[k, other], beyond, known))
        rows, columns = (core.movedim(axis, 0).flatten(1) for core in (cores[k], weighed))
        known[place] = rows @ columns.T
    return known[place]


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of a Gram matrix that may be singular or zero."""
    regular = gram.double()
    regular.diagonal().add_(_FLOOR * regular.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular)).to(gram.dtype)


@dataclass(frozen=True)
class Point:
    """Cores as one vector, with the value of f and its gradient."""

    vector: Tensor  # all cores, flattened one after another
    value: float
    gradient: Tensor  # in the layout of ``vector``


class LBFGS:
    """The state of a minimisation; ``run`` continues it.

    Args:
        metric: the metric in whitened coordinates; the arithmetic has its dtype.
        start: a form whose factors multiply out to the metric's sides.
    """

    def __init__(self, metric: Metric | BesideLowRank, start: Form) -> None:
        self.metric = metric
        self._start = start
        self._shapes = [core.shape for core in start.cores]
        # (step, change of gradient, their product), the latest last
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
        numbers = [core.reshape(-1) for core in start.cores]
        self.point = self._at(torch.cat(numbers).to(metric.target.dtype))

    @property
    def form(self) -> Form:
        """The form at the present point."""
        return self._start.with_cores(self._split(self.point.vector))

    def run(self, steps: int) -> bool:
        """Take up to ``steps`` steps; return whether all of them lowered f."""
        return all(self._step() for _ in range(steps))

    def _step(self) -> bool:
        """Step along the L-BFGS direction or, if that fails, along the preconditioned gradient."""
        if self._search():
            return True
        if not self.pairs:
            return False
        self.pairs.clear()
        return self._search()

    def _search(self) -> bool:
        """Move to a lower point along the present direction; return whether there is one."""
        here = self.point
        direction = -self._inverse_hessian(here.gradient)
        slope = float(here.gradient @ direction)
        length = 1.0
        for _ in range(_SHORTENINGS if slope < 0 else 0):
            there = self._at(here.vector + length * direction)
            if there.value < here.value:
                step, change = there.vector - here.vector, there.gradient - here.gradient
                curvature = float(step @ change)
                if curvature > 1e-6 * float(step.norm() * change.norm()):
                    self.pairs.append((step, change, curvature))
                self.point = there
                return True
            bend = there.value - here.value - slope * length  # of the parabola through both points
            length *= min(max(-slope * length / (2 * bend), 0.1), 0.5) if bend > 0 else 0.1
        return False

    def _at(self, vector: Tensor) -> Point:
        with torch.enable_grad():
            vector = vector.detach().requires_grad_()
            matrix = self._start.with_cores(self._split(vector)).to_matrix()[0]
            value, weighted = self.metric.weighed_error(self.metric.target - matrix.detach())
            # The gradient of a scalar: given another one, torch imports sympy, which takes half a second.
            gradient = torch.autograd.grad((matrix * (-2 * weighted)).sum(), vector)[0]
        return Point(vector.detach(), value, gradient)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """The cores of a vector."""
        parts = vector.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Apply the inverse Hessian by the two-loop recursion around the preconditioner."""
        weights: list[float] = []
        for step, change, curvature in reversed(self.pairs):
            weights.append(float(step @ gradient) / curvature)
            gradient = torch.add(gradient, change, alpha=-weights[-1])
        result = self._precondition(gradient)
        if self.pairs:
            _, change, curvature = self.pairs[-1]
            result.mul_(curvature / float(change @ self._precondition(change)))
        for (step, change, curvature), weight in zip(self.pairs, reversed(weights), strict=True):
            result.add_(step, alpha=weight - float(change @ result) / curvature)
        return result

    def _precondition(self, vector: Tensor) -> Tensor:
        """Half the vector, each core divided by the Gram matrices beyond its bonds."""
        given = iter(self._split(vector))
        parts = []
        for term in self.form.terms:
            for inverses in inverse_grams(term.cores, term.legs):
                part = next(given)
                for axis, inverse in inverses.items():
                    part = along(part, axis, inverse)
                parts.append(part.reshape(-1) / 2)
        return torch.cat(parts)
