"""Allocate a budget of parameters or bytes to the layers of a calibrated compression, and to forms.

The curve of each layer, error over size, is scaled by how far the network's outputs move when that layer
alone is compressed.  The budget then goes where it has the largest marginal gain: in all forms, in one of
them alone, or uniformly, whichever leaves held-out outputs nearest to the dense ones.

An allocation is kept on disk, so that a compression that is resumed need not find it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from mpoc.compression.budget import allocate
from mpoc.compression.calibrate.bit_allocation import bits_by_movement, too_small
from mpoc.compression.calibrate.calibrated_fit import Storage
from mpoc.compression.calibrate.candidates import (
    Candidate,
    Candidates,
    CandidateTable,
    costs_of,
    storage_of,
)
from mpoc.compression.calibrate.objective import one_matrix
from mpoc.compression.calibrate.output_distance import OutputDistance
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import DEFAULT_EFFORT, Recipe
from mpoc.compression.resume import in_order_key
from mpoc.compression.run_context import LARGE_KERNEL
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.keyed_store import find_item, put_item
from mpoc.io.manifest_reader import record_from_json, record_to_json
from mpoc.io.open_checkpoint import read_finite
from mpoc.io.safetensors_header import ITEMSIZE
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.factors import wide_factors
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.structure import Structure, lead_outputs_inputs, make_structure
from mpoc.tensor_networks.topology import CHAIN

_SURPRISING = 3  # times the expected distance

# Ways to allocate a budget.
WAYS = (
    "uniform",
    "equal gain",
    "equal gain, chains alone",
    "equal gain, svd alone",
    "equal gain, meras alone",
)

# Forms that may be chosen, by effort and by what a layer is.  Others seldom win there: see the guide.
_MENUS: dict[str, dict[str, tuple[str, ...]]] = {
    "fast": dict.fromkeys(("matrix", "kernel", "large kernel", "embedding"), ("svd",)),
    "balanced": {
        "matrix": ("svd", "svd+mpo"),
        "kernel": ("mera",),
        "large kernel": ("svd",),
        "embedding": ("svd", "mpo"),
    },
    "thorough": {
        "matrix": ("svd", "mpo", "svd+mpo"),
        **dict.fromkeys(("kernel", "large kernel"), ("svd", "mpo", "svd+mpo", "mera")),
        "embedding": ("svd", "mpo"),
    },
}
_SMALL = 1 << 16  # numbers of a matrix of which a sum is soon fitted, to know its error
_ATTEMPTS = 3  # at an allocation whose whole file is within the size


@dataclass(frozen=True)
class Allocation:
    """Plans with their bonds, and the distance of the outputs that each way to allocate is expected to give.

    The distances are of layers compressed each by itself, not yet in sequence.
    """

    plans: list[LayerPlan]
    chosen: str  # one of WAYS
    distances: dict[str, float]

    def warnings(self, reached: float) -> list[str]:
        """A warning if the outputs are much further off than expected, as with too few examples.

        Args:
            reached: distance of the held-out outputs after the fits.
        """
        expected = self.distances[self.chosen]
        if expected == 0 or reached <= _SURPRISING * expected:
            return []
        return [
            f"held-out outputs diverge by {reached:.3g} from the dense network, "
            f"{reached / expected:.0f} times as much as when the budget was allocated, so the allocation may "
            "be poor: evaluate the network (mpoc eval), and try more --calibration-samples or another --ratio"
        ]


def parameters(plan: LayerPlan, one: Candidate | None = None) -> int:
    """Parameters of a layer as planned, or in the place of that as a candidate."""
    return plan.record().num_stored if one is None else one.parameters


def stored_bytes(plan: LayerPlan, one: Candidate | None = None) -> int:
    """Bytes of a layer as planned, or in the place of that as a candidate."""
    if one is not None and plan.rounding is None:
        return one.parameters * ITEMSIZE[plan.stored_dtype if one.storage else plan.map.dtype]
    return (plan if one is None else one.applied_to(plan)).record().stored_bytes


def allocate_by_gain(
    plans: Sequence[LayerPlan],
    table: CandidateTable,
    cost: Callable[..., int],
    budget: int,
    distance: OutputDistance,
) -> Allocation:
    """Allocate by equal marginal gain in every way there is, and uniformly; keep the nearest outputs.

    Args:
        plans: of all selected layers, allocated uniformly.
        table: candidates of the layers that take part.
        cost: :func:`parameters` or :func:`stored_bytes`.
        budget: of those layers together.
        distance: on held-out inputs.
    """
    part = {plan.map.name: plan for plan in plans if plan.map.name in table.every}
    scales = table.scales(distance.of_some)
    ways: dict[str, list[LayerPlan]] = {}
    if sum(map(cost, part.values())) <= budget:
        ways["uniform"] = [
            _of_size(plan, table.every[name], scales[name]) if (name := plan.map.name) in part else plan
            for plan in plans
        ]
    for way, open_to in _menus(table.every).items():
        curves = [
            [(cost(plan, one), _moved(one, scales[name])) for one in open_to[name]]
            for name, plan in part.items()
        ]
        taken = allocate(curves, budget)
        if taken is not None:
            chosen = {name: open_to[name][k] for name, k in zip(part, taken, strict=True)}
            ways[way] = [_with_choice(plan, chosen) for plan in plans]
    ways = ways or {"uniform": list(plans)}
    distances = table.distances(ways, distance)
    best = min(distances, key=lambda way: distances[way])
    return Allocation(ways[best], best, distances)


def _with_choice(plan: LayerPlan, chosen: Mapping[str, Candidate]) -> LayerPlan:
    return chosen[plan.map.name].applied_to(plan) if plan.map.name in chosen else plan


def _menus(every: Mapping[str, Sequence[Candidate]]) -> dict[str, dict[str, Sequence[Candidate]]]:
    """Ways to allocate by gain: among candidates of all forms and, if there are several, of one form alone.

    Errors of one form compare well; how errors of two forms add up in the network's outputs is less certain.
    """
    forms = {form for candidates in every.values() for c in candidates if (form := c.form) is not None}
    menus = {WAYS[1]: dict(every)}
    for form, way in zip(("mpo", "svd", "mera"), WAYS[2:], strict=True):
        if len(forms) > 1 and form in forms:
            menus[way] = {name: _only(candidates, form) for name, candidates in every.items()}
    return menus


def _only(every: Sequence[Candidate], form: str) -> Sequence[Candidate]:
    """The candidates of this form and the dense one; all candidates if the layer has none of this form."""
    chosen = [candidate for candidate in every if candidate.form in (form, None)]
    return chosen if len(chosen) > 1 else every


def _moved(candidate: Candidate, scales: Mapping[str, float]) -> float:
    """The movement of the outputs that a candidate is expected to make."""
    return 0.0 if candidate.form is None else candidate.error * scales[candidate.form]


def _of_size(plan: LayerPlan, every: Sequence[Candidate], scales: Mapping[str, float]) -> LayerPlan:
    """The plan with the best candidate no larger than planned, of equals the one that errs least, if any."""
    if plan.is_dense:
        return plan
    size = plan.record().num_stored
    within = [one for one in every if one.storage is not None and one.parameters <= size]
    best = min(within, key=lambda one: (_moved(one, scales), one.error), default=None)
    return plan if best is None else best.applied_to(plan)


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
    """Decides which layers share the budget of a calibrated compression, and in which forms.

    Args:
        statistics: of the dense network on calibration data.
        checkpoint: to read weights from.
        recipe: its options.
    """

    def __init__(self, statistics: CalibrationStatistics, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._statistics, self._checkpoint, self._recipe = statistics, checkpoint, recipe
        self.allocation: Allocation | None = None

    @cached_property
    def distance(self) -> OutputDistance:
        """The distance of held-out outputs from the dense ones."""
        kept: dict[str, OutputDistance] = self._statistics.kept
        if "distance" not in kept:
            kept["distance"] = OutputDistance(self._statistics)
        return kept["distance"]

    @property
    def compares_ways(self) -> bool:
        """Whether :data:`WAYS` to allocate a common budget of numbers or of floats are compared."""
        has_budget = self._recipe.ratio is not None or self._recipe.size is not None
        return has_budget and not self._recipe.shares_bits

    def allocate(
        self, plans: list[LayerPlan], predict_size: Callable[[list[LayerPlan]], int]
    ) -> list[LayerPlan]:
        """Plans with the common budget allocated by gain; without a common budget the plans as they are.

        Args:
            plans: allocated uniformly.
            predict_size: bytes of the weight files under a plan, an upper bound; for ``--size``.
        """
        if self._recipe.shares_bits:
            with self._statistics.context.group.all_or_raise():
                distance = self.distance
            return bits_by_movement(
                plans, self._statistics, self._checkpoint, self._recipe, distance, predict_size
            )
        if not self.compares_ways:
            return plans
        folder = self._statistics.folder
        if folder is None:
            self.allocation = self._allocated(plans, predict_size)
        else:
            key = in_order_key(self._statistics.fingerprint, self._checkpoint, plans, self._recipe)
            compute = partial(self._allocated, plans, predict_size)
            self.allocation = cached_or_allocated(
                folder / "allocation.safetensors", key, plans, compute, self._statistics.context.group
            )
        return self.allocation.plans

    def _allocated(
        self, plans: list[LayerPlan], predict_size: Callable[[list[LayerPlan]], int]
    ) -> Allocation:
        known = {name for group in self._statistics.groups for name in group}
        takes_part = [p for p in plans if p.map.name in known and self._has_no_goal_of_its_own(p)]
        group = self._statistics.context.group
        with group.all_or_raise():
            distance = self.distance
        own = [takes_part[k].map.name for k in group.own_indices(costs_of(takes_part))]
        candidates = partial(self._candidates_of, own=own)
        fits = partial(self._statistics.workload.fits, self._statistics.pass_seconds)
        table = CandidateTable(takes_part, candidates, self._statistics.context, fits)
        if self._recipe.size is not None:
            return self._within_size(plans, table, int(self._recipe.size), predict_size)
        assert self._recipe.ratio is not None
        others = sum(plan.record().num_stored for plan in plans if plan.map.name not in table.every)
        budget = int(self._recipe.ratio * sum(plan.structure.num_original for plan in plans)) - others
        return allocate_by_gain(plans, table, parameters, budget, distance)

    def _within_size(
        self,
        plans: list[LayerPlan],
        table: CandidateTable,
        size: int,
        predict_size: Callable[[list[LayerPlan]], int],
    ) -> Allocation:
        """Allocate bytes; all but the layers is as large as with the plans before.

        Raises:
            UsageError: no allocation is within the size.
        """
        cost, tried, spare = cache(stored_bytes), plans, size - predict_size(plans)
        for _ in range(_ATTEMPTS):
            budget = spare + sum(cost(plan) for plan in tried if plan.map.name in table.every)
            allocation = allocate_by_gain(plans, table, cost, budget, self.distance)
            tried = allocation.plans
            spare = size - predict_size(tried)
            if spare >= 0:
                return allocation
        smallest = [plan if plan.is_dense else replace(plan, goal=Truncation(1)) for plan in plans]
        raise too_small(size, predict_size(smallest))

    def _candidates_of(self, plan: LayerPlan, own: Sequence[str]) -> Candidates:
        """The candidates of a layer, the same for every budget; ``own``: the layers of this process."""
        name, forms, tries_all = plan.map.name, self._forms(plan), self._recipe.effort == "thorough"
        kept: dict[Any, Candidates] = self._statistics.kept.setdefault("candidates", {})
        key = name, forms, plan.structure if self._has_own_factors(plan) else None
        if key not in kept:
            later = self._statistics.workload.after_pricing(self._statistics.pass_seconds)
            context = replace(self._statistics.context, later=later)
            context.log("what each form would cost: layer", own.index(name) + 1, len(own))
            weight = read_finite(self._checkpoint, name).to(context.device)
            kept[key] = Candidates(
                one_matrix(weight, plan.structure.kind, plan.structure.transposed),
                [self._structure(plan, form) for form in forms],
                partial(self._statistics.dense_objective, name),
                measures_sums=tries_all or len(forms) == 1 or plan.structure.num_original <= _SMALL,
                scratch=self._statistics.scratch,
            )
        return kept[key]

    def storages(self, plan: LayerPlan) -> list[Storage]:
        """The storage of the plan and, where the form is open, two factors of the same size."""
        planned = storage_of(plan)
        if planned.structure.one_matrix or not self._is_open(plan):
            return [planned]
        two = plan.structure.as_low_rank()
        rank = planned.num_parameters // two.num_parameters(1)
        return [planned, Storage(two, rank)] if rank else [planned]

    def _is_open(self, plan: LayerPlan) -> bool:
        """Whether the form of a layer may be chosen."""
        form = self._recipe.rule_for(plan.map.name).form or self._recipe.form
        return form == "auto" and not self._has_own_factors(plan) and self._has_no_goal_of_its_own(plan)

    def _forms(self, plan: LayerPlan) -> tuple[str, ...]:
        """The forms among which a layer may choose."""
        form = self._recipe.rule_for(plan.map.name).form or self._recipe.form
        if self._is_open(plan):
            return _MENUS[self._recipe.effort or DEFAULT_EFFORT][_kind(plan.structure)]
        return (
            (form,) if form is not None and form != "auto" and FORMS[form].parts else (plan.structure.form,)
        )

    def _has_own_factors(self, plan: LayerPlan) -> bool:
        """Whether the recipe gives factors or a number of sites."""
        rule, structure = self._recipe.rule_for(plan.map.name), plan.structure
        _, outputs, inputs = lead_outputs_inputs(structure.kind, structure.shape, structure.transposed)
        factors = self._recipe.factors_for(plan.map.name, outputs, inputs)
        return factors is not None or (rule.sites or self._recipe.sites) is not None

    def _has_no_goal_of_its_own(self, plan: LayerPlan) -> bool:
        rule = self._recipe.rule_for(plan.map.name)
        return rule.bond is None and rule.max_error is None and not rule.dense

    def _structure(self, plan: LayerPlan, form: str) -> Structure:
        structure = plan.structure
        if form == "mera" and structure.form != form:
            return make_structure(structure.kind, structure.shape, structure.transposed, form=form)
        return self._mpo_structure(plan).as_form(form)

    def _mpo_structure(self, plan: LayerPlan) -> Structure:
        structure = plan.structure
        if self._has_own_factors(plan) or structure.topology is not CHAIN:
            return structure
        if structure.kind != "linear":  # measured: for embeddings and kernels, the more sites the better
            return make_structure(structure.kind, structure.shape, structure.transposed)
        _, outputs, inputs = lead_outputs_inputs(structure.kind, structure.shape, structure.transposed)
        factors = wide_factors(outputs, inputs)
        return make_structure(structure.kind, structure.shape, structure.transposed, None, factors)


def _kind(structure: Structure) -> str:
    """What a layer is to the forms: a kernel of one tap is a matrix."""
    if structure.kind.startswith("conv") and math.prod(structure.shape[2:]) > 1:
        return "kernel" if structure.num_original <= LARGE_KERNEL else "large kernel"
    return "embedding" if structure.kind == "embedding" else "matrix"
