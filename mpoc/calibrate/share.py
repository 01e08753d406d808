"""Which form and bond each layer gets of a common budget: equal marginal gain in f.

Each layer offers its error over its parameters: the closed form of ``svd`` at every rank, MPOs and sums, and
the weight as it is.  It is f on held-out inputs: on those of the fit, forms with more freedom look better
than they are.  An MPO's error, as a share of what ``svd`` leaves at the same size, varies little: it is
measured at one size, of an embedding at two.  So that layers compare, each curve is scaled to how far the
network's outputs move when that layer alone is compressed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mpoc.budget import largest_bond
from mpoc.calibrate.evidence import Evidence
from mpoc.calibrate.fit import Storage
from mpoc.calibrate.outputs import OutputDistance, Replaced
from mpoc.curves import share_out
from mpoc.fit.weighted_mpo import Problem, matrix_of
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.forms.layout import from_matrix
from mpoc.plan import LayerPlan
from mpoc.structure import Structure, low_rank_structure

_STRETCHES = 3
_TELLING = 1e-3  # of a layer's largest error: smaller ones say nothing of how far outputs move
_SIZES = 32  # at which they are offered
_MPO_SHARE = 0.4  # of a sum's parameters


@dataclass(frozen=True)
class Offer:
    """One way to store a layer."""

    storage: Storage | None  # None: dense
    parameters: int
    error: float


class Offers:
    """The ways to store one layer, with f on held-out inputs.

    Args:
        matrix: W as one matrix (N_y, N_x), float64.
        structure: of the layer's MPO.
        evidence: of the dense network's inputs.
        forms: of ``svd``, ``mpo`` and ``svd+mpo``, which may be chosen.
    """

    def __init__(
        self, matrix: Tensor, structure: Structure, evidence: Evidence, forms: Sequence[str]
    ) -> None:
        self._matrix, self._evidence = matrix, evidence
        self._low_rank = low_rank_structure(structure.kind, structure.shape, structure.transposed)
        svd = weighted_svd(evidence.metric(matrix, evidence.usual_gamma))
        self._left, self._right = svd.left.float(), svd.right.float()
        self._errors = evidence.felt.of_ranks(matrix, svd.left, svd.right).tolist()
        self._problem: Problem | None = None
        self._found: dict[Storage, Tensor] = {}  # float32 matrices fitted so far
        self.every = [Offer(None, structure.num_original, 0.0)]
        if "svd" in forms or structure.form == "svd":
            self.every += self._of_svd()
        if structure.form == "mpo":
            for form in ("mpo", "svd+mpo"):
                self.every += self._of_mpo(structure, form == "svd+mpo") if form in forms else []
        self._let_go()

    def error(self, storage: Storage) -> float:
        """f on held-out inputs."""
        if storage.structure.form == "svd":
            return self._errors[min(storage.bond, len(self._errors)) - 1]
        return self._evidence.felt.squared(self._matrix.double(), self.matrix(storage).double())

    def matrix(self, storage: Storage) -> Tensor:
        """Ŵ (N_y, N_x) of this choice in float32, fitted to the dense network's inputs."""
        if storage.structure.form == "svd":
            return self._left[:, : storage.bond] @ self._right[: storage.bond]
        if storage not in self._found:
            if self._problem is None or self._problem.structure != storage.structure:
                metric = self._evidence.metric(self._matrix.double(), self._evidence.mpo_gamma)
                self._problem = Problem(metric, storage.structure)
            fit = self._problem.fit(storage.bond, rank=storage.low_rank, max_stretches=_STRETCHES)
            self._found[storage] = matrix_of(fit.terms).float()
        return self._found[storage]

    def replaced(self, plan: LayerPlan) -> Replaced:
        """The layer as the plan has it, were it compressed alone."""
        found = self.matrix(storage_of(plan))
        shift = self._evidence.shift(self._matrix.double(), found.double())
        self._let_go()
        return Replaced(from_matrix(found[None], self._low_rank), shift)

    def _let_go(self) -> None:
        """Of all that can be had again: layers offer at the same time, and are fitted one by one."""
        self._problem, self._matrix, self._evidence = None, self._matrix.float(), replace(self._evidence)

    def _of_svd(self) -> Iterator[Offer]:
        for rank, error in enumerate(self._errors, start=1):
            storage = Storage(self._low_rank, rank)
            if storage.num_parameters < self._low_rank.num_original:
                yield Offer(storage, storage.num_parameters, error)

    def _of_mpo(self, structure: Structure, is_sum: bool) -> Iterator[Offer]:
        """At sizes in a geometric row, with errors told from those that are measured."""
        original = structure.num_original
        measured = [int(share * original) for share in self._evidence.measured]
        known = dict(self._shares_of_svd(structure, measured, is_sum))
        sizes = [int(original ** (k / _SIZES)) for k in range(1, _SIZES)]
        offered = (largest_within(structure, found, is_sum) for found in (*sizes, *measured, original - 1))
        for storage in dict.fromkeys(offered):
            if storage is not None and known:
                size = storage.num_parameters
                yield Offer(storage, size, _share_at(known, size) * self._svd_error(size))

    def _shares_of_svd(
        self, structure: Structure, sizes: Sequence[int], is_sum: bool
    ) -> Iterator[tuple[int, float]]:
        """At each size that is met: parameters, and the error over that of ``svd`` of as many."""
        for size in sizes:
            storage = largest_within(structure, size, is_sum)
            known = 0.0 if storage is None else self._svd_error(storage.num_parameters)
            if storage is not None and known > 0.0:
                yield storage.num_parameters, self.error(storage) / known

    def _svd_error(self, parameters: int) -> float:
        """That of the rank that takes so many parameters, between two of them in proportion."""
        rank = parameters / self._low_rank.num_parameters(1)
        below = max(1, min(len(self._errors), int(rank)))
        above = min(len(self._errors), below + 1)
        weight = min(1.0, max(0.0, rank - below))
        return (1 - weight) * self._errors[below - 1] + weight * self._errors[above - 1]


def _share_at(known: Mapping[int, float], size: int) -> float:
    """A straight line in log(size) through the smallest and the largest known size; flat below them."""
    small, large = min(known), max(known)
    if size <= small or small == large:
        return known[small]
    line = known[small] + (known[large] - known[small]) * math.log(size / small) / math.log(large / small)
    return max(line, min(known.values()))


def largest_within(structure: Structure, parameters: int, is_sum: bool) -> Storage | None:
    """The largest MPO, or sum of a matrix of low rank and one, of at most so many parameters."""
    share = _MPO_SHARE if is_sum else 1
    bond = largest_bond(structure, share * parameters / structure.num_original)
    if bond is None or structure.num_parameters(bond) > share * parameters:
        return None
    storage = Storage(structure, bond)
    if not is_sum:
        return storage
    one_rank = Storage(structure, bond, 1).num_parameters - storage.num_parameters
    rank = (parameters - storage.num_parameters) // one_rank
    return replace(storage, low_rank=rank) if rank else None


def storage_of(plan: LayerPlan) -> Storage:
    """How a plan that is not dense stores its layer."""
    assert plan.max_bond is not None
    return Storage(plan.structure, plan.max_bond, plan.low_rank)


@dataclass(frozen=True)
class Shares:
    """Plans with their bonds, and how far the outputs move under each way to share, not yet in order."""

    plans: list[LayerPlan]
    chosen: str  # "equal gain" or "uniform"
    distances: dict[str, float]


@dataclass(frozen=True)
class Costs:
    """Of one number of a layer, in the unit of the budget: 1, or its bytes."""

    stored: int = 1  # in a core
    dense: int = 1

    def of(self, plan: LayerPlan) -> int:
        """Of the layer as planned."""
        each = self.dense if plan.max_bond is None else self.stored
        return each * plan.record().num_stored


def share_by_gain(
    plans: Sequence[LayerPlan],
    offers: Mapping[str, Offers],
    costs: Mapping[str, Costs],
    budget: int,
    distance: OutputDistance,
) -> Shares:
    """The structures and bonds that take most off the error, or those given where the outputs prefer them.

    Args:
        plans: of all selected layers, bonds shared out uniformly.
        offers: of those that take part, by the name of the weight.
        costs: of each layer that takes part.
        budget: of those together.
        distance: on held-out inputs.
    """
    part = {plan.map.name: plan for plan in plans if plan.map.name in offers}
    curves = []
    for name, plan in part.items():
        scale, cost = _scale(offers[name], plan, distance), costs[name]
        numbers = [
            offer.parameters * (cost.stored if offer.storage else cost.dense) for offer in offers[name].every
        ]
        errors = [offer.error * scale for offer in offers[name].every]
        curves.append(list(zip(numbers, errors, strict=True)))
    taken = share_out(curves, budget)
    ways = {"uniform": [_in_best_form(plan, offers.get(plan.map.name)) for plan in plans]}
    if taken is not None and sum(costs[name].of(plan) for name, plan in part.items()) > budget:
        ways = {}
    if taken is not None:
        chosen = {name: offers[name].every[k] for name, k in zip(part, taken, strict=True)}
        ways["equal gain"] = [
            _as_offered(plan, chosen[plan.map.name]) if plan.map.name in chosen else plan for plan in plans
        ]
    distances = {way: distance.of(_replaced(shared, offers)) for way, shared in ways.items()}
    best = min(distances, key=lambda way: distances[way])
    return Shares(ways[best], best, distances)


def _scale(offers: Offers, plan: LayerPlan, distance: OutputDistance) -> float:
    """From errors to those that the outputs feel, told at the layer's plan.

    Where that is dense, or errs so little that rounding drowns it, at the offer that errs most.
    """
    smaller = [offer for offer in offers.every if offer.storage is not None]
    most = max(smaller, key=lambda offer: offer.error, default=None)
    if most is None:
        return 1.0
    if plan.max_bond is None or offers.error(storage_of(plan)) < _TELLING * most.error:
        plan = _as_offered(plan, most)
    error = offers.error(storage_of(plan))
    return distance.of({plan.map.name: offers.replaced(plan)}) / error if error > 0 else 1.0


def _replaced(plans: Sequence[LayerPlan], offers: Mapping[str, Offers]) -> dict[str, Replaced]:
    return {
        plan.map.name: offers[plan.map.name].replaced(plan)
        for plan in plans
        if plan.map.name in offers and plan.max_bond is not None
    }


def _in_best_form(plan: LayerPlan, offers: Offers | None) -> LayerPlan:
    """The same size, as the layer offers it with the least error."""
    if offers is None or plan.max_bond is None:
        return plan
    size = plan.record().num_stored
    within = [offer for offer in offers.every if offer.storage is not None and offer.parameters <= size]
    return _as_offered(plan, min(within, key=lambda offer: offer.error)) if within else plan


def _as_offered(plan: LayerPlan, offer: Offer) -> LayerPlan:
    storage = offer.storage
    if storage is None:
        return replace(plan, max_bond=None, low_rank=0, reason="worth its parameters as it is")
    found = replace(plan, structure=storage.structure, max_bond=storage.bond, low_rank=storage.low_rank)
    return replace(found, reason="")
