"""Which form and bond each layer gets of a common budget: equal marginal gain in f.

Each layer offers its error over its parameters: the closed form of ``svd`` at every rank, MPOs at some bonds,
and the weight as it is.  It is f on held-out inputs: on those of the fit, forms with more freedom look better
than they are.  So that layers compare, each curve is scaled to how far the network's outputs move when that
layer alone is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.calibrate.fit import Evidence, metric_of, squared_error
from mpoc.calibrate.outputs import OutputDistance, Replaced
from mpoc.curves import share_out
from mpoc.fit.weighted_mpo import matrix_of, weighted_fit
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.forms.layout import from_matrix
from mpoc.forms.mpo import MPO
from mpoc.plan import LayerPlan
from mpoc.structure import Structure, low_rank_structure

_GAMMA, _MPO_GAMMA = 0.02, 0.2  # of the curves; each fit chooses its own
_BONDS = 4  # at how many an MPO's curve is computed


@dataclass(frozen=True)
class Offer:
    """One way to store a layer."""

    structure: Structure | None  # None: dense
    bond: int
    parameters: int
    error: float


class Offers:
    """The ways to store one layer, with f on held-out inputs.

    Args:
        matrix: W as one matrix (N_y, N_x), float64.
        structure: of the layer's MPO.
        evidence: of the dense network's inputs.
        forms: of ``svd`` and ``mpo``, which may be chosen.
    """

    def __init__(
        self, matrix: Tensor, structure: Structure, evidence: Evidence, forms: Sequence[str]
    ) -> None:
        self._matrix, self._evidence = matrix, evidence
        self._low_rank = low_rank_structure(structure.kind, structure.shape, structure.transposed)
        self._svd = weighted_svd(metric_of(matrix, evidence, _GAMMA))
        self._errors = self._low_rank_errors()
        self._forms: dict[tuple[tuple[int, ...], tuple[int, ...], int], MPO] = {}  # fitted so far
        self.every = [Offer(None, 0, structure.num_original, 0.0)]
        if "svd" in forms:
            self.every += self._of_svd()
        if "mpo" in forms and structure.form == "mpo":
            self.every += self._of_mpo(structure)

    def scale_to(self, distance: float, structure: Structure, bond: int) -> None:
        """Give all errors the scale at which this choice's is ``distance``."""
        error = self.error(structure, bond)
        if error > 0:
            self.every = [replace(offer, error=offer.error * distance / error) for offer in self.every]

    def error(self, structure: Structure, bond: int) -> float:
        """f on held-out inputs."""
        if structure.form == "svd":
            return self._errors[min(bond, len(self._errors)) - 1]
        found, evidence = self.matrix(structure, bond), self._evidence
        return squared_error(self._matrix, found, evidence.unseen, evidence.outputs)

    def matrix(self, structure: Structure, bond: int) -> Tensor:
        """Ŵ (N_y, N_x) of this choice, fitted to the dense network's inputs."""
        if structure.form == "svd":
            return self._svd.left[:, :bond] @ self._svd.right[:bond]
        key = structure.output_factors, structure.input_factors, bond
        if key not in self._forms:
            metric = metric_of(self._matrix, self._evidence, _MPO_GAMMA)
            self._forms[key] = weighted_fit(metric, structure, bond, max_stretches=1).form
        return matrix_of(self._forms[key])

    def replaced(self, plan: LayerPlan) -> Replaced:
        """The layer as the plan has it, were it compressed alone."""
        assert plan.max_bond is not None
        found = self.matrix(plan.structure, plan.max_bond)
        moments = self._evidence.moments
        shift = None
        if self._evidence.centred:
            shift = self._matrix @ moments.dense_mean - found @ moments.mean
        return Replaced(from_matrix(found[None], self._low_rank), shift)

    def _low_rank_errors(self) -> list[float]:
        """Of the best weight L_r R_r of every rank; its square is Σ_{k,l<r} (Lᵀ G L)_kl (R M Rᵀ)_kl."""
        evidence, found = self._evidence, self._svd
        left, right, second = found.left, found.right, evidence.unseen
        weighed = left if evidence.outputs is None else evidence.outputs @ left
        squares = (weighed.T @ left) * (right @ second.mine @ right.T)
        joint = ((weighed.T @ self._matrix @ second.cross) * right).sum(1)
        whole = squared_error(self._matrix, torch.zeros_like(self._matrix), second, evidence.outputs)
        errors = whole - 2 * joint.cumsum(0) + squares.cumsum(0).cumsum(1).diagonal()
        return errors.clamp(min=0).tolist()

    def _of_svd(self) -> Iterator[Offer]:
        for rank, error in enumerate(self._errors, start=1):
            parameters = self._low_rank.num_parameters(rank)
            if parameters < self._low_rank.num_original:
                yield Offer(self._low_rank, rank, parameters, error)

    def _of_mpo(self, structure: Structure) -> Iterator[Offer]:
        """At bonds in a geometric row."""
        original = structure.num_original
        shrinking = (b for b in range(structure.full_bond, 0, -1) if structure.num_parameters(b) < original)
        largest = next(shrinking, 0)
        bonds = {max(1, round(largest ** (k / (_BONDS - 1)))) for k in range(_BONDS)} if largest else set()
        for bond in sorted(bonds):
            yield Offer(structure, bond, structure.num_parameters(bond), self.error(structure, bond))


@dataclass(frozen=True)
class Shares:
    """Plans with their bonds, and how far the outputs move under each way to share, not yet in order."""

    plans: list[LayerPlan]
    chosen: str  # "equal gain" or "uniform"
    distances: dict[str, float]


def share_by_gain(
    plans: Sequence[LayerPlan], offers: Mapping[str, Offers], budget: int, distance: OutputDistance
) -> Shares:
    """The structures and bonds that take most off the error, or those given where the outputs prefer them.

    Args:
        plans: of all selected layers, bonds shared out uniformly.
        offers: of those that take part, by the name of the weight.
        budget: parameters of those together.
        distance: on held-out inputs.
    """
    names = [plan.map.name for plan in plans if plan.map.name in offers]
    for plan in plans:
        if plan.map.name in offers:
            _scale(offers[plan.map.name], plan, distance)
    every = [offers[name].every for name in names]
    taken = share_out([[(offer.parameters, offer.error) for offer in each] for each in every], budget)
    ways = {"uniform": list(plans)}
    if taken is not None:
        chosen = {name: each[k] for name, each, k in zip(names, every, taken, strict=True)}
        ways["equal gain"] = [
            _as_offered(plan, chosen[plan.map.name]) if plan.map.name in chosen else plan for plan in plans
        ]
    distances = {way: distance.of(_replaced(shared, offers)) for way, shared in ways.items()}
    best = min(distances, key=lambda way: distances[way])
    return Shares(ways[best], best, distances)


def _scale(offers: Offers, plan: LayerPlan, distance: OutputDistance) -> None:
    """Errors as the network's outputs feel them, at the layer's plan, else at its largest offer."""
    if plan.max_bond is None:
        smaller = [offer for offer in offers.every if offer.structure is not None]
        if not smaller:
            return
        largest = max(smaller, key=lambda offer: offer.parameters)
        plan = _as_offered(plan, largest)
    assert plan.max_bond is not None
    far = distance.of({plan.map.name: offers.replaced(plan)})
    offers.scale_to(far, plan.structure, plan.max_bond)


def _replaced(plans: Sequence[LayerPlan], offers: Mapping[str, Offers]) -> dict[str, Replaced]:
    return {
        plan.map.name: offers[plan.map.name].replaced(plan)
        for plan in plans
        if plan.map.name in offers and plan.max_bond is not None
    }


def _as_offered(plan: LayerPlan, offer: Offer) -> LayerPlan:
    if offer.structure is None:
        return replace(plan, max_bond=None, reason="worth its parameters as it is")
    return replace(plan, structure=offer.structure, max_bond=offer.bond, reason="")
