"""A budget shared out among layers and forms by equal marginal gain in f, or equally, as outputs prefer.

So that layers compare, the curve of each is scaled to how far the network's outputs move when that layer
alone is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpoc.calibrate.choices import Choices
from mpoc.calibrate.offers import Offer
from mpoc.calibrate.outputs import OutputDistance
from mpoc.curves import share_out
from mpoc.plan import LayerPlan

_MUCH = 3  # times as far as told

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

    def surprise(self, reached: float) -> list[str]:
        """What should be said where outputs are much further off after the fits, as of too few examples."""
        told = self.distances[self.chosen]
        if told == 0 or reached <= _MUCH * told:
            return []
        far = f"held-out outputs are {reached:.3g} from the dense ones, {reached / told:.0f} times as far as"
        return [
            f"{far} when the budget was shared out, so its shares may be bad: measure it (mpoc eval); "
            "more --calibration-samples tell better, or try another --ratio"
        ]


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
    choices: Choices,
    costs: Mapping[str, Costs],
    budget: int,
    distance: OutputDistance,
) -> Shares:
    """The structures and bonds that take most off the error, or those given where the outputs prefer them.

    Args:
        plans: of all selected layers, bonds shared out uniformly.
        choices: of the layers that take part.
        costs: of each of them.
        budget: of those together.
        distance: on held-out inputs.
    """
    part = {plan.map.name: plan for plan in plans if plan.map.name in choices.every}
    ways: dict[str, list[LayerPlan]] = {}
    if sum(costs[name].of(plan) for name, plan in part.items()) <= budget:
        ways["uniform"] = [_of_size(plan, choices.every.get(plan.map.name, ())) for plan in plans]
    for way, open_to in _menus(choices.every).items():
        told_at = part if way == WAYS[1] else {k: _of_size(plan, open_to[k]) for k, plan in part.items()}
        scales = choices.scales(told_at, distance)
        taken = share_out([_curve(open_to[name], scales[name], costs[name]) for name in part], budget)
        if taken is not None:
            chosen = {name: open_to[name][k] for name, k in zip(part, taken, strict=True)}
            ways[way] = [_as_chosen(plan, chosen) for plan in plans]
    ways = ways or {"uniform": list(plans)}
    distances = {way: choices.distance(shared, distance) for way, shared in ways.items()}
    best = min(distances, key=lambda way: distances[way])
    return Shares(ways[best], best, distances)


def _as_chosen(plan: LayerPlan, chosen: Mapping[str, Offer]) -> LayerPlan:
    return chosen[plan.map.name].taken_by(plan) if plan.map.name in chosen else plan


def _menus(every: Mapping[str, Sequence[Offer]]) -> dict[str, dict[str, Sequence[Offer]]]:
    """Ways to share by gain: in every form on offer, and where those are several, in one of them alone.

    Errors of one form compare well; how those of two add up in the network's outputs is less sure.
    """
    forms = {form for offers in every.values() for form in map(_form, offers) if form is not None}
    menus = {WAYS[1]: dict(every)}
    for form, way in zip(("mpo", "svd", "mera"), WAYS[2:], strict=True):
        if len(forms) > 1 and form in forms:
            menus[way] = {name: _only(offers, form) for name, offers in every.items()}
    return menus


def _only(every: Sequence[Offer], form: str) -> Sequence[Offer]:
    """Offers of this form, and the dense one; all where there are none."""
    found = [offer for offer in every if _form(offer) in (form, None)]
    return found if len(found) > 1 else every


def _form(offer: Offer) -> str | None:
    """None: dense."""
    if offer.storage is None:
        return None
    return "svd+mpo" if offer.storage.low_rank else offer.storage.structure.form


def _curve(every: Sequence[Offer], scale: float, cost: Costs) -> list[tuple[int, float]]:
    """What each offer costs, and its error as the outputs feel it."""
    return [
        (offer.parameters * (cost.stored if offer.storage else cost.dense), offer.error * scale)
        for offer in every
    ]


def _of_size(plan: LayerPlan, every: Sequence[Offer]) -> LayerPlan:
    """What errs least of these offers, of those no larger than planned; the plan itself where none is."""
    if plan.max_bond is None:
        return plan
    size = plan.record().num_stored
    within = [offer for offer in every if offer.storage is not None and offer.parameters <= size]
    return min(within, key=lambda offer: offer.error).taken_by(plan) if within else plan
