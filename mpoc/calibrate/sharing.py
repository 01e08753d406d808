"""Which layers share a common budget, in which forms, and how: equal marginal gain in f.

So that layers compare, the curve of each is scaled to how far the network's outputs move when that layer
alone is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mpoc.calibrate.evidence import one_matrix
from mpoc.calibrate.fit import Storage
from mpoc.calibrate.offers import Offer, Offers, storage_of
from mpoc.calibrate.outputs import OutputDistance, Replaced
from mpoc.calibrate.study import Study
from mpoc.checkpoint import Checkpoint
from mpoc.curves import share_out
from mpoc.errors import UsageError
from mpoc.factors import wide_factors
from mpoc.fitting import read_finite
from mpoc.header import ITEMSIZE
from mpoc.plan import LayerPlan
from mpoc.recipe import Recipe
from mpoc.structure import Structure, lead_outputs_inputs, make_structure

_TELLING = 1e-3  # of a layer's largest error: smaller ones say nothing of how far outputs move
_FAR = 1e12  # in the place of an infinite distance: a network that gives no numbers
_ATTEMPTS = 3  # at shares whose file, names and all, is within a ceiling


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


class Sharing:
    """The choices of a calibrated compression.

    Args:
        study: of the network and the calibration data.
        checkpoint: that is compressed.
        recipe: its options.
        device: to compute on.
    """

    def __init__(self, study: Study, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
        self._study, self._checkpoint, self._recipe, self._device = study, checkpoint, recipe, device
        self.shares: Shares | None = None

    @cached_property
    def distance(self) -> OutputDistance:
        """Of the network's held-out outputs from the dense ones."""
        return OutputDistance(self._study)

    def share(
        self, plans: list[LayerPlan], predict_size: Callable[[list[LayerPlan]], int]
    ) -> list[LayerPlan]:
        """Plans with a common budget shared out anew, by what each layer gains; others as they are.

        Args:
            plans: with equal shares.
            predict_size: bytes of the whole output, an upper bound; for a ceiling on that.
        """
        ratio, size = self._recipe.ratio, self._recipe.size
        if ratio is None and size is None:
            return plans
        known = {name for group in self._study.groups for name in group}
        takes_part = [p for p in plans if p.map.name in known and self._has_no_goal_of_its_own(p)]
        offers = {
            plan.map.name: self._offers(plan, k, len(takes_part))
            for k, plan in enumerate(takes_part, start=1)
        }
        if ratio is not None:
            total = sum(plan.structure.num_original for plan in plans)
            others = sum(plan.record().num_stored for plan in plans if plan.map.name not in offers)
            costs, budget = dict.fromkeys(offers, Costs()), int(ratio * total) - others
            self.shares = share_by_gain(plans, offers, costs, budget, self.distance)
        if size is not None:
            self.shares = self._within_size(plans, offers, size, predict_size)
        return plans if self.shares is None else self.shares.plans

    def _within_size(
        self,
        plans: list[LayerPlan],
        offers: dict[str, Offers],
        size: int,
        predict_size: Callable[[list[LayerPlan]], int],
    ) -> Shares:
        """Shares of bytes.

        Raises:
            UsageError: nothing so small is found.
        """
        costs = {plan.map.name: _bytes(plan) for plan in plans if plan.map.name in offers}
        budget = sum(costs[plan.map.name].of(plan) for plan in plans if plan.map.name in offers)
        budget += size - predict_size(plans)
        for _ in range(_ATTEMPTS):
            shares = share_by_gain(plans, offers, costs, budget, self.distance)
            excess = predict_size(shares.plans) - size
            if excess <= 0:
                return shares
            budget -= excess
        raise UsageError(
            f"--size {size}: too small for what calibration records of each layer", "a larger --size"
        )

    def _offers(self, plan: LayerPlan, k: int, count: int) -> Offers:
        """Those of layer ``k`` of ``count``, the same for every budget."""
        name, forms = plan.map.name, self._forms(plan)
        kept: dict[Any, Offers] = self._study.kept
        key = name, forms, plan.structure if self._has_own_factors(plan) else None
        if key not in kept:
            if self._study.tell:
                self._study.tell("what each form would cost: layer", k, count)
            weight = read_finite(self._checkpoint, name).to(self._device)
            kept[key] = Offers(
                one_matrix(weight, plan.structure.kind, plan.structure.transposed),
                self._mpo_structure(plan),
                self._study.dense_evidence(name),
                forms,
                self._other_structures(plan, forms),
            )
        return kept[key]

    def storages(self, plan: LayerPlan) -> list[Storage]:
        """The plan's, and where the form is open two factors of the same size."""
        planned = storage_of(plan)
        if "svd" not in self._forms(plan) or planned.structure.form == "svd":
            return [planned]
        one = plan.structure
        two = one.as_low_rank()
        rank = planned.num_parameters // two.num_parameters(1)
        return [planned, Storage(two, rank)] if rank else [planned]

    def _forms(self, plan: LayerPlan) -> tuple[str, ...]:
        form = self._recipe.rule_for(plan.map.name).form or self._recipe.form
        if form == "auto" and not self._has_own_factors(plan) and self._has_no_goal_of_its_own(plan):
            return ("svd", "mpo") if plan.map.kind == "embedding" else ("svd", "mpo", "svd+mpo")
        return ("svd+mpo",) if form == "svd+mpo" else (plan.structure.form,)

    def _has_own_factors(self, plan: LayerPlan) -> bool:
        """Whether factors, or a number of sites, were asked for."""
        rule, one = self._recipe.rule_for(plan.map.name), plan.structure
        _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
        factors = self._recipe.factors_for(plan.map.name, outputs, inputs)
        return factors is not None or (rule.sites or self._recipe.sites) is not None

    def _has_no_goal_of_its_own(self, plan: LayerPlan) -> bool:
        rule = self._recipe.rule_for(plan.map.name)
        return rule.bond is None and rule.max_error is None and not rule.dense

    def _other_structures(self, plan: LayerPlan, forms: tuple[str, ...]) -> list[Structure]:
        """A MERA of a kernel where the form is open; measured, it errs least by far, and is small there."""
        one = plan.structure
        if len(forms) == 1 or not one.kind.startswith("conv"):
            return []
        return [make_structure(one.kind, one.shape, one.transposed, network="mera")]

    def _mpo_structure(self, plan: LayerPlan) -> Structure:
        one = plan.structure
        if self._has_own_factors(plan) or one.network != "chain":
            return one
        if one.kind != "linear":  # of tables and kernels, measured, the more sites the better
            return make_structure(one.kind, one.shape, one.transposed)
        _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
        factors = wide_factors(outputs, inputs)
        return make_structure(one.kind, one.shape, one.transposed, None, factors)


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


def _bytes(plan: LayerPlan) -> Costs:
    return Costs(ITEMSIZE[plan.stored_dtype], ITEMSIZE[plan.map.dtype])
