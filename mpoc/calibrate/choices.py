"""What the layers of a network offer; several processes share the layers, and each answers for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from mpoc.calibrate.fit import Storage
from mpoc.calibrate.offers import Offer, Offers, storage_of
from mpoc.calibrate.outputs import OutputDistance, Replaced
from mpoc.plan import LayerPlan
from mpoc.team import ALONE, Team

_TELLING = 1e-3  # of a layer's largest error: smaller ones say nothing of how far outputs move
_FAR = 1e12  # in the place of an infinite distance: a network that gives no numbers


class Choices:
    """Of the layers that take part in a budget; the same in all processes.

    Args:
        plans: of these layers.
        offers: of one of them.
        mates: the processes.
    """

    def __init__(
        self, plans: Sequence[LayerPlan], offers: Callable[[LayerPlan], Offers], mates: Team = ALONE
    ) -> None:
        self.mates = mates
        self._names = [plan.map.name for plan in plans]
        self._costs = costs_of(plans)
        self._own: dict[str, Offers] = {}
        self._moved: dict[tuple[str, Storage], float] = {}  # how far outputs move, of one layer alone

        def measure(plan: LayerPlan) -> list[Offer]:
            self._own[plan.map.name] = offers(plan)
            return self._own[plan.map.name].every

        self.every = dict(zip(self._names, mates.each(plans, measure, self._costs), strict=True))

    def scales(self, told_at: Mapping[str, LayerPlan], distance: OutputDistance) -> dict[str, float]:
        """By weight: from errors to those that the outputs feel, told at a plan of each layer.

        Where that is dense, or errs so little that rounding drowns it, at the offer that errs most.
        """

        def scale(name: str) -> float:
            return self._scale(self._own[name], told_at[name], distance)

        return dict(zip(self._names, self.mates.each(self._names, scale, self._costs), strict=True))

    def distance(self, plans: Iterable[LayerPlan], distance: OutputDistance) -> float:
        """Of the network's outputs, where the layers that take part are as these plans have them."""
        planned = {plan.map.name: plan for plan in plans if plan.max_bond is not None}

        def replace(name: str) -> Replaced | None:
            return self._own[name].replaced(planned[name]) if name in planned else None

        found = list(self.mates.each_for_first(self._names, replace, self._costs))
        layers = {name: one for name, one in zip(self._names, found, strict=True) if one is not None}
        return self.mates.by_first(lambda: distance.of(layers))

    def _scale(self, offers: Offers, plan: LayerPlan, distance: OutputDistance) -> float:
        smaller = [offer for offer in offers.every if offer.storage is not None]
        most = max(smaller, key=lambda offer: offer.error, default=None)
        if most is None:
            return 1.0
        if plan.max_bond is None or offers.error(storage_of(plan)) < _TELLING * most.error:
            plan = most.taken_by(plan)
        error = offers.error(storage_of(plan))
        if error == 0:
            return 1.0
        told = plan.map.name, storage_of(plan)
        if told not in self._moved:
            self._moved[told] = distance.of({plan.map.name: offers.replaced(plan)})
        return min(_FAR, self._moved[told]) / error


def costs_of(plans: Sequence[LayerPlan]) -> list[float]:
    """By which processes share layers; the same for every budget."""
    return [float(plan.structure.num_original) for plan in plans]
