"""A budget shared out among layers and forms by equal marginal gain in f, or equally, as outputs prefer.

So that layers compare, the curve of each is scaled to how far the network's outputs move when that layer
alone is compressed.

How a budget was shared out, in a file, so that a compression that goes on need not find it again.

Which layers of a calibrated compression share its budget, in which forms, and within which ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mpoc.compression.budget import share_out
from mpoc.compression.calibrate.calibrated_fit import Storage
from mpoc.compression.calibrate.candidates import (
    Candidate,
    Candidates,
    CandidateTable,
    OutputDistance,
    costs_of,
    storage_of,
)
from mpoc.compression.calibrate.objective import one_matrix
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe
from mpoc.compression.resume import in_order_key
from mpoc.errors import UsageError
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.keyed_store import find_item, put_item
from mpoc.io.manifest import record_to_json
from mpoc.io.manifest_reader import record_from_json
from mpoc.io.open_checkpoint import read_finite
from mpoc.io.safetensors_header import ITEMSIZE
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.factors import wide_factors
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.structure import Structure, lead_outputs_inputs, make_structure
from mpoc.tensor_networks.topology import CHAIN

_MUCH = 3  # times as far as told

# How a budget is shared out.
WAYS = (
    "uniform",
    "equal gain",
    "equal gain, chains alone",
    "equal gain, svd alone",
    "equal gain, meras alone",
)

_ATTEMPTS = 3  # at shares whose file, names and all, is within a ceiling


@dataclass(frozen=True)
class Allocation:
    """Plans with their bonds, and how far the outputs move under each way to share, not yet in order."""

    plans: list[LayerPlan]
    chosen: str  # one of WAYS
    distances: dict[str, float]

    def surprise(self, reached: float) -> list[str]:
        """What should be said where outputs are much further off after the fits, as of too few examples."""
        expected = self.distances[self.chosen]
        if expected == 0 or reached <= _MUCH * expected:
            return []
        return [
            f"held-out outputs diverge by {reached:.3g} from the dense network, "
            f"{reached / expected:.0f} times as much as when the budget was allocated, so the allocation may "
            "be poor: evaluate the network (mpoc eval), and try more --calibration-samples or another --ratio"
        ]


@dataclass(frozen=True)
class UnitCost:
    """Of one number of a layer, in the unit of the budget: 1, or its bytes."""

    stored: int = 1  # in a core
    dense: int = 1

    def of(self, plan: LayerPlan) -> int:
        """Of the layer as planned."""
        each = self.dense if plan.is_dense else self.stored
        return each * plan.record().num_stored


def allocate_by_gain(
    plans: Sequence[LayerPlan],
    choices: CandidateTable,
    costs: Mapping[str, UnitCost],
    budget: int,
    distance: OutputDistance,
) -> Allocation:
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
    return Allocation(ways[best], best, distances)


def _as_chosen(plan: LayerPlan, chosen: Mapping[str, Candidate]) -> LayerPlan:
    return chosen[plan.map.name].taken_by(plan) if plan.map.name in chosen else plan


def _menus(every: Mapping[str, Sequence[Candidate]]) -> dict[str, dict[str, Sequence[Candidate]]]:
    """Ways to share by gain: in every form on offer, and where those are several, in one of them alone.

    Errors of one form compare well; how those of two add up in the network's outputs is less sure.
    """
    forms = {form for offers in every.values() for form in map(_form, offers) if form is not None}
    menus = {WAYS[1]: dict(every)}
    for form, way in zip(("mpo", "svd", "mera"), WAYS[2:], strict=True):
        if len(forms) > 1 and form in forms:
            menus[way] = {name: _only(offers, form) for name, offers in every.items()}
    return menus


def _only(every: Sequence[Candidate], form: str) -> Sequence[Candidate]:
    """Offers of this form, and the dense one; all where there are none."""
    found = [offer for offer in every if _form(offer) in (form, None)]
    return found if len(found) > 1 else every


def _form(offer: Candidate) -> str | None:
    """None: dense."""
    if offer.storage is None:
        return None
    return offer.storage.structure.form


def _curve(every: Sequence[Candidate], scale: float, cost: UnitCost) -> list[tuple[int, float]]:
    """What each offer costs, and its error as the outputs feel it."""
    return [
        (offer.parameters * (cost.stored if offer.storage else cost.dense), offer.error * scale)
        for offer in every
    ]


def _of_size(plan: LayerPlan, every: Sequence[Candidate]) -> LayerPlan:
    """What errs least of these offers, of those no larger than planned; the plan itself where none is."""
    if plan.is_dense:
        return plan
    size = plan.record().num_stored
    within = [offer for offer in every if offer.storage is not None and offer.parameters <= size]
    return min(within, key=lambda offer: offer.error).taken_by(plan) if within else plan


def cached_or_allocated(
    path: Path,
    key: str,
    plans: list[LayerPlan],
    allocate: Callable[[], Allocation],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Allocation:
    """The allocation at ``path`` if it has this key and is whole; else allocate and keep the result there.

    Args:
        path: of an item of the keyed store.
        key: says what the allocation depends on.
        plans: before the allocation.
        allocate: computes it.
        group: the processes that call this together.

    Raises:
        OSError: of writing.
    """
    kept = group.on_main(lambda: _read(path, key, plans))
    if kept is not None:
        return kept
    allocation = allocate()
    with group.all_or_raise():
        if group.is_main:
            put_item(path, _to_json(allocation), {"key": key}, announced=False)
    return allocation


def _to_json(allocation: Allocation) -> dict[str, Any]:
    layers = [{"bond": _cap(plan), "record": record_to_json(plan.record())} for plan in allocation.plans]
    return {"chosen": allocation.chosen, "distances": allocation.distances, "layers": layers}


def _cap(plan: LayerPlan) -> int | None:
    """None where the layer stays dense."""
    return None if plan.is_dense else plan.truncation.max_bond


def _read(path: Path, key: str, plans: list[LayerPlan]) -> Allocation | None:
    item = find_item(path, {"key": key})
    if item is None:
        return None
    layers = [_as_kept(plan, **kept) for plan, kept in zip(plans, item.record["layers"], strict=True)]
    return Allocation(layers, item.record["chosen"], item.record["distances"])


def _as_kept(plan: LayerPlan, bond: int | None, record: str) -> LayerPlan:
    kept = record_from_json(record)
    if bond is None:
        return plan.left_dense(kept.reason)
    return replace(plan, structure=kept.structure, goal=Truncation(bond, rank=kept.low_rank))


class BudgetAllocator:
    """The choices of a calibrated compression.

    Args:
        study: of the network and the calibration data.
        checkpoint: that is compressed.
        recipe: its options.
    """

    def __init__(self, study: CalibrationStatistics, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._study, self._checkpoint, self._recipe = study, checkpoint, recipe
        self.shares: Allocation | None = None

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
        if self._recipe.ratio is None and self._recipe.size is None:
            return plans
        folder = self._study.folder
        if folder is None:
            self.shares = self._found(plans, predict_size)
        else:
            key = in_order_key(self._study.fingerprint, self._checkpoint, plans, self._recipe)
            found = partial(self._found, plans, predict_size)
            self.shares = cached_or_allocated(
                folder / "allocation.safetensors", key, plans, found, self._study.context.group
            )
        return self.shares.plans

    def _found(self, plans: list[LayerPlan], predict_size: Callable[[list[LayerPlan]], int]) -> Allocation:
        known = {name for group in self._study.groups for name in group}
        takes_part = [p for p in plans if p.map.name in known and self._has_no_goal_of_its_own(p)]
        group = self._study.context.group
        with group.all_or_raise():
            distance = self.distance
        offers = partial(self._offers, count=len(group.own_indices(costs_of(takes_part))))
        choices = CandidateTable(takes_part, offers, group)
        if self._recipe.size is not None:
            return self._within_size(plans, choices, self._recipe.size, predict_size)
        assert self._recipe.ratio is not None
        total = sum(plan.structure.num_original for plan in plans)
        others = sum(plan.record().num_stored for plan in plans if plan.map.name not in choices.every)
        costs, budget = dict.fromkeys(choices.every, UnitCost()), int(self._recipe.ratio * total) - others
        return allocate_by_gain(plans, choices, costs, budget, distance)

    def _within_size(
        self,
        plans: list[LayerPlan],
        choices: CandidateTable,
        size: int,
        predict_size: Callable[[list[LayerPlan]], int],
    ) -> Allocation:
        """Shares of bytes.

        Raises:
            UsageError: nothing so small is found.
        """
        costs = {plan.map.name: _bytes(plan) for plan in plans if plan.map.name in choices.every}
        budget = sum(costs[plan.map.name].of(plan) for plan in plans if plan.map.name in costs)
        budget += size - predict_size(plans)
        for _ in range(_ATTEMPTS):
            shares = allocate_by_gain(plans, choices, costs, budget, self.distance)
            excess = predict_size(shares.plans) - size
            if excess <= 0:
                return shares
            budget -= excess
        raise UsageError(
            f"--size {size}: too small for what calibration records of each layer", "a larger --size"
        )

    def _offers(self, plan: LayerPlan, count: int) -> Candidates:
        """Those of one of so many layers of this process, the same for every budget."""
        name, forms = plan.map.name, self._forms(plan)
        kept: dict[Any, Candidates] = self._study.kept
        key = name, forms, plan.structure if self._has_own_factors(plan) else None
        if key not in kept:
            context = self._study.context
            context.log("what each form would cost: layer", len(kept) + 1, -(-count // context.group.size))
            weight = read_finite(self._checkpoint, name).to(context.device)
            kept[key] = Candidates(
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
        if planned.structure.one_matrix:
            return [planned]
        two = plan.structure.as_low_rank()
        if two.form not in self._forms(plan):
            return [planned]
        rank = planned.num_parameters // two.num_parameters(1)
        return [planned, Storage(two, rank)] if rank else [planned]

    def _forms(self, plan: LayerPlan) -> tuple[str, ...]:
        form = self._recipe.rule_for(plan.map.name).form or self._recipe.form
        if form == "auto" and not self._has_own_factors(plan) and self._has_no_goal_of_its_own(plan):
            return ("svd", "mpo") if plan.map.kind == "embedding" else ("svd", "mpo", "svd+mpo")
        return (
            (form,) if form is not None and form != "auto" and FORMS[form].parts else (plan.structure.form,)
        )

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
        return [make_structure(one.kind, one.shape, one.transposed, form="mera")]

    def _mpo_structure(self, plan: LayerPlan) -> Structure:
        one = plan.structure
        if self._has_own_factors(plan) or one.topology is not CHAIN:
            return one
        if one.kind != "linear":  # of tables and kernels, measured, the more sites the better
            return make_structure(one.kind, one.shape, one.transposed)
        _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
        factors = wide_factors(outputs, inputs)
        return make_structure(one.kind, one.shape, one.transposed, None, factors)


def _bytes(plan: LayerPlan) -> UnitCost:
    return UnitCost(ITEMSIZE[plan.stored_dtype], ITEMSIZE[plan.map.dtype])
