"""Which form and bond each layer gets of a common budget: equal marginal gain in f.

Each layer offers its error f over its parameters, with the output metric G and times its positions, so that
layers compare: the closed form of ``svd`` at every rank, MPOs at some bonds, and the weight as it is.  The
shares are kept only if they do better than uniform ones on held-out inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mpoc.calibrate.fit import Evidence, matrix_of, metric_of, shift_of, squared_error
from mpoc.curves import share_out
from mpoc.fit.metric import Metric
from mpoc.fit.weighted_mpo import weighted_fit
from mpoc.fit.weighted_svd import WeightedSVD, weighted_svd
from mpoc.plan import LayerPlan
from mpoc.structure import Structure, low_rank_structure

_GAMMA = 0.02  # of the curves; each fit chooses its own
_BONDS = 6  # at how many an MPO's curve is computed


@dataclass(frozen=True)
class Offer:
    """One way to store a layer."""

    structure: Structure | None  # None: dense
    bond: int
    parameters: int
    error: float  # f on the inputs of the fit, times positions


class Offers:
    """The ways to store one layer.

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
        self._metric: Metric = metric_of(matrix, evidence, _GAMMA)
        self._low_rank = low_rank_structure(structure.kind, structure.shape, structure.transposed)
        self._svd: WeightedSVD = weighted_svd(self._metric)
        self.every = [Offer(None, 0, structure.num_original, 0.0)]
        if "svd" in forms:
            self.every += self._of_svd()
        if "mpo" in forms and structure.form == "mpo":
            self.every += self._of_mpo(structure)

    def _of_svd(self) -> Iterator[Offer]:
        tails = self._svd.values.square().flip(0).cumsum(0).flip(0).tolist()
        for rank, error in enumerate([*tails[1:], 0.0], start=1):
            parameters = self._low_rank.num_parameters(rank)
            if parameters < self._low_rank.num_original:
                yield Offer(self._low_rank, rank, parameters, self._evidence.moments.rows * error)

    def _of_mpo(self, structure: Structure) -> Iterator[Offer]:
        """At bonds in a geometric row."""
        original = structure.num_original
        shrinking = (b for b in range(structure.full_bond, 0, -1) if structure.num_parameters(b) < original)
        largest = next(shrinking, 0)
        bonds = {max(1, round(largest ** (k / (_BONDS - 1)))) for k in range(_BONDS)} if largest else set()
        for bond in sorted(bonds):
            form = weighted_fit(self._metric, structure, bond, max_stretches=1).form
            error = self._evidence.moments.rows * self._metric.value(matrix_of(form))
            yield Offer(structure, bond, structure.num_parameters(bond), error)

    def held_out(self, structure: Structure | None, bond: int) -> float:
        """f on held-out inputs, times positions."""
        if structure is None:
            return 0.0
        if structure.form == "svd":
            left, right = self._svd.factors(bond)
            found = left @ right
        else:
            found = matrix_of(weighted_fit(self._metric, structure, bond, max_stretches=1).form)
        evidence = self._evidence
        shift = shift_of(self._matrix, found, evidence)
        error = squared_error(self._matrix, found, evidence.held_out, shift, evidence.outputs)
        return evidence.moments.rows * error


@dataclass(frozen=True)
class Shares:
    """Plans with their bonds, and how they compare on held-out inputs."""

    plans: list[LayerPlan]
    chosen: str  # "equal gain" or "uniform"
    errors: dict[str, float]  # of both: f, summed over the layers


def share_by_gain(plans: Sequence[LayerPlan], offers: Mapping[str, Offers], budget: int) -> Shares:
    """The structures and bonds that take most off the error, or those given where they do better.

    Args:
        plans: of all selected layers, bonds shared out uniformly.
        offers: of those that take part, by the name of the weight.
        budget: parameters of those together.
    """
    names = [plan.map.name for plan in plans if plan.map.name in offers]
    every = [offers[name].every for name in names]
    taken = share_out([[(offer.parameters, offer.error) for offer in each] for each in every], budget)
    uniform = _error(plans, offers)
    if taken is None:
        return Shares(list(plans), "uniform", {"uniform": uniform})
    chosen = {name: each[k] for name, each, k in zip(names, every, taken, strict=True)}
    shared = [_as_offered(plan, chosen[plan.map.name]) if plan.map.name in chosen else plan for plan in plans]
    errors = {"equal gain": _error(shared, offers), "uniform": uniform}
    best = min(errors, key=lambda way: errors[way])
    return Shares(shared if best == "equal gain" else list(plans), best, errors)


def _error(plans: Sequence[LayerPlan], offers: Mapping[str, Offers]) -> float:
    return sum(
        offers[plan.map.name].held_out(None if plan.max_bond is None else plan.structure, plan.max_bond or 0)
        for plan in plans
        if plan.map.name in offers
    )


def _as_offered(plan: LayerPlan, offer: Offer) -> LayerPlan:
    if offer.structure is None:
        return replace(plan, max_bond=None, reason="worth its parameters as it is")
    return replace(plan, structure=offer.structure, max_bond=offer.bond, reason="")
