"""Fit layers in the order of the network, each to the inputs that the compressed layers before it give.

Two copies of the network run side by side: a dense one, and one that gets the compressed weights as they are
found.  The bias of a layer, or the running mean of the batch norm right behind it, corrects the mean of its
error.  If asked for, the layers of each block are then refined together.  A layer whose inputs cannot be
observed is fitted to its weight alone, before all others.

The schedule says in what order layers are fitted, which of them together, and what share of the time each
takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.allocation import WAYS, BudgetAllocator
from mpoc.compression.calibrate.bit_allocation import SameSize, are_nearly_exact, errors_move_between_rows
from mpoc.compression.calibrate.block_refinement import BlockPosition, BlockRefinement, Schedule
from mpoc.compression.calibrate.calibrated_fit import (
    CalibratedFit,
    FitSettings,
    fit_calibrated,
    judge,
    with_figures,
)
from mpoc.compression.calibrate.calibrated_rounding import (
    CalibratedRounding,
    low_rank_if_better,
    round_calibrated,
)
from mpoc.compression.calibrate.candidates import is_small
from mpoc.compression.calibrate.objective import Objective, one_matrix
from mpoc.compression.calibrate.output_distance import RecalibratedNorms, keeps_statistics, recalibrated_norms
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plain_fit import Fitted, check_finite_cores, fit_layer, have_changed
from mpoc.compression.plan import LayerPlan, leave_dense_unless_smaller
from mpoc.compression.recipe import Recipe
from mpoc.compression.run_context import seconds_of_passes
from mpoc.compression.size_prediction import LONGEST_FIGURE
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord, bond_fields
from mpoc.io.open_checkpoint import naming, read_finite
from mpoc.models.introspection import set_tensors, state_of
from mpoc.quantize.codes import QuantizedTensor
from mpoc.runtime.device import on_one_thread
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.forms.form import Form, form_of


class SequentialFit:
    """The calibrated fit of a checkpoint.

    Args:
        statistics: of the dense network on calibration data.
        checkpoint: to read weights from.
        recipe: its options.
    """

    def __init__(self, statistics: CalibrationStatistics, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._statistics, self._checkpoint, self._recipe = statistics, checkpoint, recipe
        self._device, self._group = statistics.context.device, statistics.context.group
        self._compressed = statistics.network_to_compress()
        self._allocator = BudgetAllocator(statistics, checkpoint, recipe)
        self._norms: RecalibratedNorms | None = None
        self._reached: float | None = None  # distance of held-out outputs after the fits
        self._likeness: dict[str, dict[str, float]] = {}  # of held-out outputs, of this and at the same size
        self.compares_gptq = recipe.effort != "fast"  # beside the likeness of the outputs
        self._same_size: SameSize | None = None  # in the main process, where all layers are rounded
        self._follows: nn.Module | None = self._compressed  # the network whose inputs layers are fitted to
        self._blocks = (
            BlockRefinement(statistics, self._compressed, checkpoint, recipe.seed)
            if statistics.refines
            else None
        )
        self.schedule = Schedule(
            statistics.groups,
            self._block_of,
            partial(statistics.workload.seconds_of_fit, one_pass=statistics.pass_seconds),
            seconds_of_passes(statistics.pass_seconds),
        )

    def allocate(self, plans: list[LayerPlan], predict_size: Callable[..., int]) -> list[LayerPlan]:
        """Allocate the budget: :meth:`mpoc.compression.calibrate.allocation.BudgetAllocator.allocate`.

        Args:
            plans: allocated uniformly.
            predict_size: bytes of the weight files from plans and, as ``calibration``, the facts.
        """
        return self._allocator.allocate(plans, partial(predict_size, calibration=self.longest_facts()))

    def facts(self) -> dict[str, Any]:
        """For the manifest: the data, the allocation, and what was refined or recalibrated."""
        facts = {**self._statistics.facts(), "reasons": self._statistics.reasons}
        allocation = self._allocator.allocation
        if allocation is not None:
            distances = {way: rounded(distance) for way, distance in allocation.distances.items()}
            facts["shares"] = {"chosen": allocation.chosen, "distances": distances}
        if self._blocks is not None:
            facts["refined"] = self._blocks.facts()
        if self._norms is not None:
            ends = {"before": rounded(self._norms.before), "after": rounded(self._norms.after)}
            facts["norms"] = {"renewed": self._norms.is_better, **ends}
        if self._likeness:
            ways = self._likeness.items()
            facts["likeness"] = {way: {name: rounded(v) for name, v in found.items()} for way, found in ways}
        return facts

    def longest_facts(self) -> dict[str, Any]:
        """Facts at least as long as those of :meth:`facts` will be, to predict a size."""
        facts, ends = self.facts(), dict.fromkeys(("before", "after"), LONGEST_FIGURE)
        if self._allocator.compares_ways:
            ways = dict.fromkeys(WAYS, LONGEST_FIGURE)
            facts["shares"] = {"chosen": max(WAYS, key=len), "distances": ways}
        if self._blocks is not None:
            positions = filter(None, set(map(self._blocks.position_of, self.schedule.observed)))
            facts["refined"] = {self._statistics.block(position): ends for position in positions}
        alike = dict.fromkeys(("agreement", "kl"), LONGEST_FIGURE)
        others = ("rounded to nearest", "GPTQ") if self.compares_gptq else ("rounded to nearest",)
        facts["likeness"] = dict.fromkeys(("this", *others), alike)
        if any(map(keeps_statistics, self._compressed.modules())):
            facts["norms"] = {"renewed": False, **ends}
        return facts

    @property
    def notes(self) -> list[str]:
        """Notes on the data, the layers fitted to their weights alone, the allocation and the refinement."""
        reasons = self._statistics.reasons
        blind = [f"{name.removesuffix('.weight')} ({why})" for name, why in reasons.items()]
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        notes = [f"not calibrated, fitted to their weights: {', '.join(blind[:4])}{more}"] if blind else []
        allocation = self._allocator.allocation
        notes += [] if allocation is None or self._reached is None else allocation.warnings(self._reached)
        notes += self._statistics.scratch.notes
        return [*self._statistics.notes, *notes, *(self._blocks.notes if self._blocks else ())]

    def fit(
        self, plans: Sequence[LayerPlan], kept: Mapping[str, Callable[[], Fitted]] | None = None
    ) -> Iterator[Fitted]:
        """Fit the layers in the order of the schedule.

        Args:
            plans: of all layers, in any order.
            kept: units of layers that an earlier run fitted; they are put into the network, and not yielded.
        """
        kept = kept or {}
        todo = {plan.map.name: plan for plan in plans}
        self._follows = None if are_nearly_exact(plans) else self._compressed
        if self._group.is_main and all(plan.is_dense for plan in plans) and any(p.rounding for p in plans):
            self._same_size = SameSize(self._statistics, self._checkpoint, plans)
        unobserved = [plan for plan in plans if plan.map.name not in {*self.schedule.observed, *kept}]
        self._restore([one for name, one in kept.items() if name not in self.schedule.observed])
        fitted = self._group.map(unobserved, self._fit_plain, [plan.cost for plan in unobserved])
        for one in fitted:
            self._put(one)
        yield from self._in_block(None, fitted, [])
        for position, groups in self.schedule.of(todo):
            names = [name for group in groups for name in group]
            if kept.keys() >= set(names):
                self._restore([kept[name] for name in names], position)
            else:
                fitted_block = [one for group in groups for one in self._fit_group(group, todo, position)]
                yield from self._in_block(position, fitted_block, groups)

    def _restore(self, kept: Sequence[Callable[[], Fitted]], position: BlockPosition | None = None) -> None:
        fitted = [one() for one in kept]
        for one in fitted:
            self._put(one)
        if self._blocks is not None:
            self._blocks.restore(position, fitted)

    def finish(self) -> dict[str, Tensor]:
        """After the last layer: recalibrated statistics of batch norms, by their names, if they help."""
        data = self._statistics.data

        def distance(network: nn.Module) -> float:  # computed only if there are norms
            return self._allocator.distance.of_network(network)

        if self._allocator.allocation is not None:
            self._reached = self._group.on_main(lambda: distance(self._compressed))

        def renewed() -> RecalibratedNorms | None:
            return recalibrated_norms(self._compressed, data.call, data.batches, distance)

        self._norms = self._group.on_main(renewed)
        changed = self._norm_statistics()
        self._statistics.set(self._compressed, changed)
        self._likeness = self._group.on_main(self._measured_likeness)
        return changed

    def _norm_statistics(self) -> dict[str, Tensor]:
        """The statistics of batch norms that take the place of the checkpoint's, by their names there."""
        if self._norms is None or not self._norms.is_better:
            return {}
        named = {inner: name for name, inner in self._statistics.places.items()}
        changed = {named[inner]: new for inner, new in self._norms.statistics.items() if inner in named}
        return {name: new.to(self._checkpoint.read(name)) for name, new in changed.items()}

    def _measured_likeness(self) -> dict[str, dict[str, float]]:
        """How like held-out outputs are to the dense ones: those of this, and of others of the same bytes."""
        distance = self._allocator.distance
        others = {}
        if self._same_size is not None:
            others = self._same_size.likeness(distance, gptq=self.compares_gptq)
        return {"this": distance.likeness(self._compressed), **others}

    def _fit_plain(self, plan: LayerPlan) -> Fitted:
        fitted = fit_layer(self._checkpoint, plan, self._recipe, self._device)
        return replace(fitted, cores=[core.cpu().contiguous() for core in fitted.cores])  # as read back

    def _block_of(self, group: Sequence[str]) -> BlockPosition | None:
        """The block that a group of layers is refined with; None: there is none, or several."""
        positions = {self._blocks.position_of(name) for name in group} if self._blocks else {None}
        return positions.pop() if len(positions) == 1 else None

    def _in_block(
        self, position: BlockPosition | None, fitted: list[Fitted], groups: list[list[str]]
    ) -> list[Fitted]:
        """The fitted layers of a block, refined if that helps, with their errors measured again."""
        if self._blocks is None:
            return fitted
        refined = self._group.on_main(lambda: self._refined(position, fitted))
        if not have_changed(refined, fitted):
            return refined
        for one in refined:
            self._put(one)
        new = {one.record.name: one for one in refined}
        for group in groups:
            objectives = self._statistics.objectives(self._compressed, group)
            new |= {name: self._judged(new[name], objectives[name]) for name in group if new[name].cores}
        return list(new.values())

    def _refined(self, position: BlockPosition | None, fitted: list[Fitted]) -> list[Fitted]:
        """The refined layers, or the layers as they were if the network's outputs are no nearer."""
        assert self._blocks is not None
        refined = self._blocks.refine(position, fitted)
        if not have_changed(refined, fitted):
            return refined
        distance = self._allocator.distance
        before = {name: tensor.data for name, tensor in state_of(self._compressed).items()}
        before_refinement = distance.of_network(self._compressed)
        for one in refined:
            self._put(one)
        if distance.of_network(self._compressed) < before_refinement:
            return refined
        set_tensors(self._compressed, before)
        return self._blocks.revert(position, fitted)

    def _judged(self, fitted: Fitted, objective: Objective) -> Fitted:
        record = fitted.record
        weight = read_finite(self._checkpoint, record.name).to(self._device)
        form = form_of([core.to(self._device) for core in fitted.cores], record.structure)
        judged = judge(weight, form, objective)
        same_size = {**(record.same_size or {}), "this": judged.output_weighted_error}
        return replace(fitted, record=with_figures(record, form, judged, same_size))

    def _fit_group(
        self, group: Sequence[str], todo: dict[str, LayerPlan], position: BlockPosition | None
    ) -> list[Fitted]:
        if all(todo[name].is_unchanged for name in group):
            return [Fitted(todo[name].record()) for name in group]
        matrices = {name: partial(self._matrix, todo[name]) for name in group if not todo[name].is_unchanged}
        objectives = self._statistics.objectives(self._follows, group, matrices)
        plans, apart = [todo[name] for name in group], position is not None
        # Processes share layers, or the trials of one.  Rounding may ask for outputs of the changed network.
        together = len(plans) > 1 and not any(plan.rounding for plan in plans)
        small = partial(is_small, device=self._device, others=together)

        def fit(plan: LayerPlan, processes: ProcessGroup) -> Fitted:
            with on_one_thread(small(plan)):
                return self._fit_one(plan, objectives[plan.map.name], apart, processes)

        if together:
            work, costs = partial(fit, processes=SINGLE_PROCESS), [plan.cost for plan in plans]
            fitted = self._group.map(plans, work, costs, small)
        else:
            fitted = [fit(plan, self._group) for plan in plans]
        for one in fitted:
            if not one.record.storage:  # else it was put there with its codes
                self._put(one)
        return fitted

    def _matrix(self, plan: LayerPlan) -> Tensor:
        """A weight of the checkpoint as the matrix (N_y, N_x) that multiplies rows; float64."""
        weight = self._checkpoint.read(plan.map.name).to(self._device)
        return one_matrix(weight, plan.map.kind, plan.map.transposed)

    def _fit_one(self, plan: LayerPlan, objective: Objective, apart: bool, processes: ProcessGroup) -> Fitted:
        """Fit one layer; errors are raised in all of the processes together, which share it."""
        if plan.is_unchanged:
            return Fitted(plan.record())
        name = plan.map.name
        with processes.all_or_raise():
            weight = read_finite(self._checkpoint, name).to(self._device)
        if plan.is_dense:
            return self._rounded(plan, weight, objective)
        settings = FitSettings(
            getattr(torch, plan.stored_dtype),
            zlib.crc32(name.encode()) ^ self._recipe.seed,
            apart,
            self._recipe.effort == "fast",
        )
        storages = self._allocator.storages(plan)
        fit = fit_calibrated(weight, storages, objective, settings, processes)
        with processes.all_or_raise():
            check_finite_cores(fit.form, weight, self._checkpoint, plan)
        if plan.rounding is not None:
            return self._rounded(plan, weight, objective, fit.form)
        return self._stored(plan, fit)

    def _rounded(
        self, plan: LayerPlan, weight: Tensor, objective: Objective, form: Form | None = None
    ) -> Fitted:
        """A layer as codes, of its weight or of fitted cores; the main process rounds.

        Feedback turns the last digit of a sum into other codes, so all processes take those of one.
        """
        if form is not None and not self._recipe.allow_growth:
            plan = leave_dense_unless_smaller(plan, form.num_parameters)
        form = None if plan.is_dense else form
        record = plan.record() if form is None else _as_fitted(plan, form)
        assert plan.rounding is not None
        rounding, in_directory = plan.rounding, self._checkpoint.is_directory
        nearest: list[QuantizedTensor] = []

        def round_with_feedback() -> CalibratedRounding:
            with naming(self._checkpoint, record.name):
                nearest.extend(rounding.codes(record, [weight] if form is None else form.cores))
                rows = self._errors_move_between_rows(plan)
                found = round_calibrated(weight, record, rounding, objective, nearest, form, rows)
                if not (plan.is_dense and self._recipe.shares_bits):
                    return found
                return low_rank_if_better(found, plan, weight, objective, rows, in_directory)

        found = self._group.on_main(round_with_feedback)
        measured = with_figures(found.record, found.form, found.judged, found.same_size)
        fitted = Fitted.rounded(measured, found.codes, self._shifted(plan.map.name, found.judged.shift))
        self._put(fitted, nearest)
        return fitted

    def _errors_move_between_rows(self, plan: LayerPlan) -> bool:
        distance, seed = self._allocator.distance, self._recipe.seed
        return errors_move_between_rows(plan, self._statistics, self._checkpoint, distance, seed)

    def _stored(self, plan: LayerPlan, fit: CalibratedFit) -> Fitted:
        """The layer with its record; dense if it would not shrink."""
        form = fit.form
        if not self._recipe.allow_growth:
            plan = leave_dense_unless_smaller(plan, form.num_parameters)
        if plan.is_dense:
            return Fitted(plan.record())
        record = with_figures(_as_fitted(plan, form), form, fit.judged, fit.same_size)
        return Fitted(record, form.cores, self._shifted(plan.map.name, fit.judged.shift))

    def _shifted(self, name: str, shift: Tensor | None) -> dict[str, Tensor]:
        """The bias plus the shift, or the running mean behind the layer less the shift, in its own dtype."""
        correction = self._statistics.means.get(name)
        if shift is None or correction is None:
            return {}
        tensor, sign = self._checkpoint.read(correction.name), correction.sign
        return {correction.name: (tensor.double() + sign * shift.to(tensor.device)).to(tensor.dtype)}

    def _put(self, fitted: Fitted, nearest: Sequence[QuantizedTensor] = ()) -> None:
        """Put what is stored of a layer into the compressed network, and keep its codes without feedback."""
        if self._same_size is not None and fitted.record.storage:
            self._same_size.keep(fitted.record, nearest)
        new = dict(fitted.changed)
        if fitted.cores:
            cores = [core.float() for core in fitted.cores]
            new[fitted.record.name] = form_of(cores, fitted.record.structure).to_weight()
        self._statistics.set(self._compressed, new)


def _as_fitted(plan: LayerPlan, form: Form) -> LayerRecord:
    """The record of a layer with the bonds that its fit ended with."""
    return replace(
        replace(plan, structure=form.structure).record(),
        num_stored=form.num_parameters,
        **bond_fields(form.structure, form.bonds),
    )
