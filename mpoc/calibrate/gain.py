"""A budget shared out among layers and forms by equal marginal gain in f, or equally, as outputs prefer.

So that layers compare, the curve of each is scaled to how far the network's outputs move when that layer
alone is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpoc.calibrate.offers import Offer, Offers, storage_of
from mpoc.calibrate.outputs import OutputDistance, Replaced
from mpoc.curves import share_out
from mpoc.plan import LayerPlan

_TELLING = 1e-3  # of a layer's largest error: smaller ones say nothing of how far outputs move
_FAR = 1e12  # in the place of an infinite distance: a network that gives no numbers


# How a budget is shared out.
WAYS = (
    "uniform",
    "equal gain",
    "equal gain, chains alone",
    "equal gain, svd alone",
    "equal gain, meras alone",
)


@dataclass(frozen=True)
class Shares:
    """Plans with their bonds, and how far the outputs move under each way to share, not yet in order."""

    plans: list[LayerPlan]
    chosen: str  # one of WAYS
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
    ways: dict[str, list[LayerPlan]] = {}
    if sum(costs[name].of(plan) for name, plan in part.items()) <= budget:
        ways["uniform"] = [_in_best_form(plan, offers.get(plan.map.name)) for plan in plans]
    for way, open_to in _menus(offers).items():
        curves = []
        for name, plan in part.items():
            told_at = plan if way == WAYS[1] else _of_size(plan, open_to[name])
            scale = _scale(offers[name], told_at, distance)
            curves.append(_curve(open_to[name], scale, costs[name]))
        taken = share_out(curves, budget)
        if taken is not None:
            chosen = {name: open_to[name][k] for name, k in zip(part, taken, strict=True)}
            ways[way] = [
                _as_offered(plan, chosen[plan.map.name]) if plan.map.name in chosen else plan
                for plan in plans
            ]
    ways = ways or {"uniform": list(plans)}
    distances = {way: distance.of(_replaced(shared, offers)) for way, shared in ways.items()}
    best = min(distances, key=lambda way: distances[way])
    return Shares(ways[best], best, distances)


def _menus(offers: Mapping[str, Offers]) -> dict[str, dict[str, list[Offer]]]:
    """Ways to share by gain: in every form on offer, and where those are several, in one of them alone.

    Errors of one form compare well; how those of two add up in the network's outputs is less sure.
    """
    forms = {form for one in offers.values() for form in map(_form, one.every) if form is not None}
    menus = {WAYS[1]: {name: one.every for name, one in offers.items()}}
    for form, way in zip(("mpo", "svd", "mera"), WAYS[2:], strict=True):
        if len(forms) > 1 and form in forms:
            menus[way] = {name: _only(one.every, form) for name, one in offers.items()}
    return menus


def _only(every: list[Offer], form: str) -> list[Offer]:
    """Offers of this form, and the dense one; all where there are none."""
    found = [offer for offer in every if _form(offer) in (form, None)]
    return found if len(found) > 1 else every


def _form(offer: Offer) -> str | None:
    """None: dense."""
    if offer.storage is None:
        return None
    return "svd+mpo" if offer.storage.low_rank else offer.storage.structure.form


def _curve(every: list[Offer], scale: float, cost: Costs) -> list[tuple[int, float]]:
    """What each offer costs, and its error as the outputs feel it."""
    return [
        (offer.parameters * (cost.stored if offer.storage else cost.dense), offer.error * scale)
        for offer in every
    ]


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
    if error == 0:
        return 1.0
    return min(_FAR, distance.of({plan.map.name: offers.replaced(plan)})) / error


def _replaced(plans: Sequence[LayerPlan], offers: Mapping[str, Offers]) -> dict[str, Replaced]:
    return {
        plan.map.name: offers[plan.map.name].replaced(plan)
        for plan in plans
        if plan.map.name in offers and plan.max_bond is not None
    }


def _in_best_form(plan: LayerPlan, offers: Offers | None) -> LayerPlan:
    """The same size, as the layer offers it with the least error."""
    return plan if offers is None else _of_size(plan, offers.every)


def _of_size(plan: LayerPlan, every: Sequence[Offer]) -> LayerPlan:
    """What errs least of these offers, of those no larger than planned; the plan itself where none is."""
    if plan.max_bond is None:
        return plan
    size = plan.record().num_stored
    within = [offer for offer in every if offer.storage is not None and offer.parameters <= size]
    return _as_offered(plan, min(within, key=lambda offer: offer.error)) if within else plan


def _as_offered(plan: LayerPlan, offer: Offer) -> LayerPlan:
    storage = offer.storage
    if storage is None:
        return replace(plan, max_bond=None, low_rank=0, reason="worth its parameters as it is")
    found = replace(plan, structure=storage.structure, max_bond=storage.bond, low_rank=storage.low_rank)
    return replace(found, reason="")
