"""Candidates: the ways in which a layer could be stored, each with its number of parameters and its error.

They are the closed form of ``svd`` at every rank, fitted tensor networks and sums, and the dense weight.  The
error is that of the objective on held-out inputs: on those of the fit, forms with more freedom look better
than they are.  Relative to what ``svd`` leaves at the same size, the error of a network varies little with
the size: it is measured at one size, of an embedding at two.  That of a sum varies so little between layers
that it need not be measured.

Several processes share the layers; each holds the candidates of its own.  Of small layers several are
measured at a time, since one alone cannot use a processor's threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.compression.budget import largest_bond
from mpoc.compression.calibrate.calibrated_fit import STRETCHES_OF_SUMS, Storage
from mpoc.compression.calibrate.objective import Objective
from mpoc.compression.calibrate.output_distance import OutputDistance, Replacement
from mpoc.compression.plan import LayerPlan
from mpoc.compression.run_context import TRIALS, Later, RunContext
from mpoc.io.keyed_store import Scratch
from mpoc.runtime.device import on_one_thread
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import from_matrix
from mpoc.tensor_networks.forms.sum import Sum
from mpoc.tensor_networks.structure import Structure

_STRETCHES = 3
_SIZES = 32  # of the candidates in one form
_FEW_INPUTS = 1024  # of a layer that one thread fits
_FEW_NUMBERS, _MANY_NUMBERS = 1 << 16, 1 << 22  # at most, where it is fitted alone and beside others
_MPO_SHARE = 0.4  # of a sum's parameters
# The squared error of a sum over that of svd, at two shares of the weight's parameters: see the guide.
_SHARES_OF_SUMS: Mapping[float, float] = {0.1: 0.93, 0.5: 0.8}

_SMALLEST_ERROR = 1e-3  # of a layer's largest error: from smaller ones the movement of outputs cannot be told
_LARGEST_DISTANCE = 1e12  # in place of an infinite distance, of a network that gives no numbers


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer."""

    storage: Storage | None  # None: dense
    parameters: int
    error: float

    @property
    def form(self) -> str | None:
        """Its form; None: dense."""
        return None if self.storage is None else self.storage.structure.form

    def applied_to(self, plan: LayerPlan) -> LayerPlan:
        """The plan of the layer with this storage."""
        storage = self.storage
        if storage is None:
            return plan.left_dense("the budget keeps it dense")
        return replace(plan, structure=storage.structure, goal=storage.truncation)


class Candidates:
    """The candidates of one layer, with their errors on held-out inputs.

    Args:
        matrix: W as one matrix (N_y, N_x), float64.
        structures: of the forms that may be chosen.
        objective: makes that on the dense network's inputs, anew where it was forgotten meanwhile.
        measures_sums: whether a sum is fitted to know its error; else that follows from the error of ``svd``.
        scratch: where the weight and its two factors are kept, since all layers keep theirs at the same time.
    """

    def __init__(
        self,
        matrix: Tensor,
        structures: Sequence[Structure],
        objective: Callable[[], Objective],
        measures_sums: bool = True,
        scratch: Scratch | None = None,
    ) -> None:
        self._make_objective, self._scratch = objective, scratch or Scratch()
        self._known_objective: Objective | None = None
        self._known_matrix: Tensor | None = None
        self._measured = self._objective.measured
        self._low_rank = structures[0].as_low_rank()
        svd = weighted_svd(self._objective.metric(matrix, self._objective.usual_gamma))
        most = 1 + self._low_rank.num_original // self._low_rank.num_parameters(1)  # that saves nothing
        most += 0 if measures_sums else most // 2  # in the place of a sum stands a higher rank
        left, right = svd.left[:, :most], svd.right[:most]
        self._scratch.put(self._key, [matrix.float(), left.float(), right.float()])
        errors = self._objective.output_weighted_error.of_ranks(matrix, left, right)
        self._errors: list[float] = errors.tolist()
        self._problem: Problem | None = None
        self._found: dict[Storage, Form] = {}  # fitted so far, in float32
        self._assumed = {s for s in structures if s.parts and not measures_sums}
        self.every = [Candidate(None, self._low_rank.num_original, 0.0)]
        for structure in structures:
            self.every += self._of_svd() if structure.one_matrix else self._of_network(structure)
        if len(self.every) == 1:  # no network of these forms is smaller than the weight
            self.every += self._of_svd()
        self._release()

    def error(self, storage: Storage) -> float:
        """The output-weighted error, squared."""
        if storage.structure.one_matrix:
            return self._errors[min(storage.bond, len(self._errors)) - 1]
        if storage.structure in self._assumed:
            size = storage.num_parameters
            return _share_at(_SHARES_OF_SUMS, size / self._low_rank.num_original) * self._svd_error(size)
        return self._objective.output_weighted_error.squared(self._matrix, self.matrix(storage).double())

    def matrix(self, storage: Storage) -> Tensor:
        """Ŵ (N_y, N_x) in float32, fitted to the dense network's inputs and stored in this way.

        In the place of a sum that is not measured stands ``svd`` of the same error.
        """
        if storage.structure in self._assumed:
            storage = Storage(self._low_rank, self._rank_of_error(self.error(storage)))
        if storage.structure.one_matrix:
            _, left, right = self._scratch.get(self._key)
            return left[:, : storage.bond] @ right[: storage.bond]
        if storage not in self._found:
            if self._problem is None or self._problem.structure != storage.structure:
                metric = self._objective.metric(self._matrix, self._objective.mpo_gamma)
                self._problem = Problem(metric, storage.structure)
            stretches = STRETCHES_OF_SUMS if storage.structure.parts else _STRETCHES
            fit = self._problem.fit(storage.truncation, max_stretches=stretches)
            self._found[storage] = fit.form.with_cores([core.float() for core in fit.form.cores])
        return matrix_of(self._found[storage]).float()

    def replaced(self, plan: LayerPlan) -> Replacement:
        """The layer as the plan has it, if it alone were compressed; on the CPU."""
        matrix = self.matrix(storage_of(plan))
        shift = self._objective.shift(self._matrix, matrix.double())
        self._release()
        weight = self._scratch.mapped(from_matrix(matrix[None], self._low_rank).cpu())
        return Replacement(weight, None if shift is None else shift.cpu())

    def references(self) -> dict[str, Candidate]:
        """Of each form that is measured the candidate at the largest measured size, to scale its errors by.

        Where its error drowns in rounding it is the candidate of largest error.
        """
        size = max(self._measured) * self._low_rank.num_original
        references = {}
        assumed = {structure.form for structure in self._assumed}
        for form in dict.fromkeys(form for one in self.every if (form := one.form) is not None):
            if form in assumed:
                continue
            own = [one for one in self.every if one.form == form]
            most = max(own, key=lambda one: one.error)
            within = [
                one for one in own if one.parameters <= size and one.error > _SMALLEST_ERROR * most.error
            ]
            references[form] = max(within, key=lambda one: one.parameters, default=most)
        return references

    def _release(self) -> None:
        """Free what can be computed again."""
        self._problem, self._known_objective, self._known_matrix = None, None, None

    @property
    def _key(self) -> tuple[str, int]:
        return "candidates", id(self)

    @property
    def _matrix(self) -> Tensor:
        """W as it is kept, in float64; one object until it is freed, by which products with it are known."""
        if self._known_matrix is None:
            self._known_matrix = self._scratch.get(self._key)[0].double()
        return self._known_matrix

    @property
    def _objective(self) -> Objective:
        if self._known_objective is None:
            self._known_objective = self._make_objective()
        return self._known_objective

    def _of_svd(self) -> Iterator[Candidate]:
        for rank, error in enumerate(self._errors, start=1):
            storage = Storage(self._low_rank, rank)
            if storage.num_parameters < self._low_rank.num_original:
                yield Candidate(storage, storage.num_parameters, error)

    def _of_network(self, structure: Structure) -> Iterator[Candidate]:
        """Candidates at sizes in a geometric series, their errors interpolated from those measured."""
        original = structure.num_original
        measured = [int(share * original) for share in self._measured]
        known: dict[float, float] = dict(self._shares_of_svd(structure, measured))
        sizes = [int(original ** (k / _SIZES)) for k in range(1, _SIZES)]
        storages = (largest_within(structure, size) for size in (*sizes, *measured, original - 1))
        for storage in dict.fromkeys(storages):
            if storage is not None and structure in self._assumed:
                yield Candidate(storage, storage.num_parameters, self.error(storage))
            elif storage is not None and known:
                size = storage.num_parameters
                yield Candidate(storage, size, _share_at(known, size) * self._svd_error(size))

    def _shares_of_svd(self, structure: Structure, sizes: Sequence[int]) -> Iterator[tuple[float, float]]:
        """At each size that can be met: parameters, and the error over that of ``svd`` with as many."""
        for size in sizes:
            storage = largest_within(structure, size)
            known = 0.0 if storage is None else self._svd_error(storage.num_parameters)
            if storage is not None and known > 0.0:
                yield storage.num_parameters, self.error(storage) / known

    def _svd_error(self, parameters: int) -> float:
        """The error of ``svd`` at the rank with so many parameters, interpolated between two ranks."""
        rank = parameters / self._low_rank.num_parameters(1)
        below = max(1, min(len(self._errors), int(rank)))
        above = min(len(self._errors), below + 1)
        weight = min(1.0, max(0.0, rank - below))
        return (1 - weight) * self._errors[below - 1] + weight * self._errors[above - 1]

    def _rank_of_error(self, error: float) -> int:
        """The rank of ``svd`` whose error is nearest."""
        return 1 + min(range(len(self._errors)), key=lambda k: abs(self._errors[k] - error))


def _share_at(known: Mapping[float, float], size: float) -> float:
    """A straight line in log(size) through the smallest and the largest known size; flat below them."""
    small, large = min(known), max(known)
    if size <= small or small == large:
        return known[small]
    line = known[small] + (known[large] - known[small]) * math.log(size / small) / math.log(large / small)
    return max(line, min(known.values()))


def largest_within(structure: Structure, parameters: int) -> Storage | None:
    """The largest network of at most so many parameters; of a sum, a share of them goes to its MPO."""
    share = _MPO_SHARE if structure.parts else 1
    network = structure.parts[0] if structure.parts else structure
    bond = largest_bond(network, share * parameters / structure.num_original)
    if bond is None or network.num_parameters(bond) > share * parameters:
        return None
    if not structure.parts:
        return Storage(structure, bond)
    rank = (parameters - network.num_parameters(bond)) // structure.parts[1].num_parameters(1)
    return Storage(structure, bond, rank) if rank else None


def storage_of(plan: LayerPlan) -> Storage:
    """How a plan that is not dense stores its layer."""
    return Storage(plan.structure, plan.truncation.max_bond, plan.truncation.rank)


class CandidateTable:
    """The candidates of all layers that take part in a budget; the same in all processes.

    Args:
        plans: of these layers.
        candidates_of: computes the candidates of one of them.
        context: the processes that share the layers, and the callbacks.
        follows: what follows so many trials, of plans that compress these layers.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        candidates_of: Callable[[LayerPlan], Candidates],
        context: RunContext,
        follows: Callable[[Collection[str], int], Later] = lambda names, trials: Later(),
    ) -> None:
        self._group, self._plans, self._follows = context.group, plans, follows
        self._small = {p.map.name for p in plans if is_small(p, context.device, others=len(plans) > 1)}
        self._names = [plan.map.name for plan in plans]
        self._context = replace(context, later=follows(self._names, TRIALS))
        self._costs = costs_of(plans)
        self._own: dict[str, Candidates] = {}
        self._moved: dict[
            tuple[str, Storage], float
        ] = {}  # distance of outputs when one layer alone is compressed
        self._measured: set[str] = set()

        def measure(plan: LayerPlan) -> list[Candidate]:
            with on_one_thread(plan.map.name in self._small):
                self._own[plan.map.name] = candidates_of(plan)
            return self._own[plan.map.name].every

        every = self._group.map(plans, measure, self._costs, lambda plan: plan.map.name in self._small)
        self.every = dict(zip(self._names, every, strict=True))

    def scales(self, distance: OutputDistance) -> dict[str, dict[str, float]]:
        """By weight and form: the movement of the outputs per error, measured at one candidate of the form.

        A sum that is not measured has that of ``svd``.
        """

        def scale(plan: LayerPlan) -> dict[str, float]:
            own = self._own[plan.map.name]
            scales = {form: self._scale(own, one, plan, distance) for form, one in own.references().items()}
            return {**scales, Sum.name: scales.get(Sum.name, scales.get("svd", 1.0))}

        scales = self._group.map(self._plans, scale, self._costs)
        return dict(zip(self._names, scales, strict=True))

    def distances(
        self, ways: Mapping[str, Sequence[LayerPlan]], distance: OutputDistance
    ) -> dict[str, float]:
        """The distance of the outputs with the layers that take part compressed, by the way to plan that.

        Args:
            ways: plans of all layers; the first two differ most, and others find much of what they tried.
            distance: on held-out inputs.
        """
        last = list(ways.values())[min(1, len(ways) - 1)]
        names = {plan.map.name for plan in last if not plan.is_dense}.intersection(self._names)
        found = {}
        for number, (way, plans) in enumerate(ways.items(), 1):
            trials = 1 if number == 1 < len(ways) else 0
            context = replace(self._context, later=self._follows(names, trials))
            found[way] = self._distance(plans, distance, way, context)
        return found

    def _distance(
        self, plans: Iterable[LayerPlan], distance: OutputDistance, way: str, context: RunContext
    ) -> float:
        stage, numbers, count = f"trying the budget, {way}: layer", itertools.count(1), len(self._own)
        planned = {plan.map.name: plan for plan in plans if not plan.is_dense}

        def replaced_by(name: str) -> Replacement | None:
            context.log(stage, next(numbers), count)
            with on_one_thread(name in self._small):
                return self._own[name].replaced(planned[name]) if name in planned else None

        is_small = self._small.__contains__
        replaced = list(self._group.map_to_main(self._names, replaced_by, self._costs, is_small))
        layers = {name: one for name, one in zip(self._names, replaced, strict=True) if one is not None}
        return self._group.on_main(lambda: distance.of(layers))

    def _scale(
        self, candidates: Candidates, reference: Candidate, plan: LayerPlan, distance: OutputDistance
    ) -> float:
        if reference.storage is None or reference.error == 0:
            return 1.0
        key = plan.map.name, reference.storage
        if key not in self._moved:
            self._measured.add(plan.map.name)
            self._context.log(
                "how far each layer moves the outputs: layer", len(self._measured), len(self._own)
            )
            replaced = candidates.replaced(reference.applied_to(plan))
            self._moved[key] = distance.of({plan.map.name: replaced})
        return min(_LARGEST_DISTANCE, self._moved[key]) / reference.error


def is_small(plan: LayerPlan, device: torch.device, others: bool = True) -> bool:
    """Whether a layer is fitted on one thread of the processor, and others like it at the same time.

    Threads that share a product of small matrices wait for one another for longer than it takes.

    Args:
        plan: of the layer.
        device: that it is fitted on.
        others: whether there are others.
    """
    few = plan.structure.lead * plan.structure.inputs <= _FEW_INPUTS
    numbers = _MANY_NUMBERS if others else _FEW_NUMBERS
    return device.type == "cpu" and few and plan.structure.num_original <= numbers


def costs_of(plans: Sequence[LayerPlan]) -> list[float]:
    """The costs by which processes share the layers; the same for every budget."""
    return [float(plan.structure.num_original) for plan in plans]
