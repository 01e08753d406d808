"""In what order layers are fitted, which of them together, and how long that takes beside the others.

Fit layers in the order of the network, each on the inputs that those before it, compressed, really give.

Two copies of the network run side by side, one dense, one that gets the compressed weights as they are
found.  What a layer's error does to the mean of its outputs is taken up by its bias, or by the running mean
of the batch norm right behind it.  If asked for, the layers of each block are then refined together.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mpoc.compression.calibrate.allocation import WAYS, BudgetAllocator
from mpoc.compression.calibrate.batch_norm import RecalibratedNorms, recalibrated_norms
from mpoc.compression.calibrate.block_refinement import BlockPosition, BlockRefinement
from mpoc.compression.calibrate.calibrated_fit import CalibratedFit, Judgement, fit_calibrated, judge
from mpoc.compression.calibrate.objective import Objective
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plain_fit import Fitted, check_finite_cores, fit_layer
from mpoc.compression.plan import LayerPlan, leave_dense_unless_smaller
from mpoc.compression.recipe import Recipe
from mpoc.compression.size_prediction import LONGEST_FIGURE
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord, bond_fields
from mpoc.io.open_checkpoint import read_finite
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import lead_outputs_inputs

# Time of a fit by the weight alone, in the unit of a calibrated one's.
_ALONE = 0.025


ScheduleStep = tuple[BlockPosition | None, list[list[str]]]


class Schedule:
    """The steps of a calibrated fit; layers go by their names.

    Args:
        groups: of layers whose inputs are known, those of one input together, in the order of the network.
        place: the block that a group is refined with; None: it is fitted by itself.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], place: Callable[[Sequence[str]], BlockPosition | None]
    ) -> None:
        self._groups, self._place = groups, place
        self.seen = {name for group in groups for name in group}  # fitted to their inputs

    def of(self, names: Container[str]) -> Iterator[ScheduleStep]:
        """Blocks, and groups of layers, with those of these names; a block is refined as a whole."""
        present = [[name for name in group if name in names] for group in self._groups]
        for place, part in groupby(filter(None, present), self._place):
            groups = list(part)
            yield from [(place, groups)] if place is not None else [(None, [group]) for group in groups]

    def units(self, plans: Sequence[LayerPlan]) -> list[list[str]]:
        """Layers that are fitted together, in order: first those, one by one, whose inputs are not known."""
        names = [plan.map.name for plan in plans]
        alone = [[name] for name in names if name not in self.seen]
        return alone + [[name for group in groups for name in group] for _, groups in self.of(names)]

    def costs(self, plans: Sequence[LayerPlan]) -> dict[str, float]:
        """Of the fits, in proportion to their time; the first layer of a unit has that of all."""
        known = {p.map.name: _cost(p) if p.map.name in self.seen else p.cost * _ALONE for p in plans}
        found = dict.fromkeys(known, 0.0)
        for unit in self.units(plans):
            found[unit[0]] = sum(known[name] for name in unit)
        return found


def _cost(plan: LayerPlan) -> float:
    """Of a calibrated fit: applications of the metric, and eigendecompositions of moments of the inputs."""
    if plan.is_dense:
        return 0.0
    one = plan.structure
    _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
    sides = inputs if one.kind == "embedding" else outputs + inputs  # a table's rows do not depend on others
    return outputs * inputs * sides + inputs**3 / 4


class SequentialFit:
    """The calibrated fit of a checkpoint.

    Args:
        study: of the network and the calibration data.
        checkpoint: that is compressed.
        recipe: its options.
    """

    def __init__(self, study: CalibrationStatistics, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._study, self._checkpoint, self._recipe = study, checkpoint, recipe
        self._device, self._group = study.context.device, study.context.group
        self._compressed = copy.deepcopy(study.network)
        self._sharing = BudgetAllocator(study, checkpoint, recipe)
        self._norms: RecalibratedNorms | None = None
        self._reached: float | None = None  # distance of held-out outputs after the fits
        self._blocks = (
            BlockRefinement(study, self._compressed, checkpoint, recipe.seed) if study.refines else None
        )
        self.steps = Schedule(study.groups, self._place)

    def share(self, plans: list[LayerPlan], predict_size: Callable[..., int]) -> list[LayerPlan]:
        """As :meth:`mpoc.compression.calibrate.allocation.BudgetAllocator.share`.

        Args:
            plans: with equal shares.
            predict_size: bytes of the whole output from plans and, as ``calibration``, the facts.
        """
        return self._sharing.share(plans, partial(predict_size, calibration=self._longest_facts()))

    def facts(self) -> dict[str, Any]:
        """For the manifest: the data, how the budget was shared out, and what was refined or renewed."""
        found = {**self._study.facts(), "reasons": self._study.reasons}
        shares = self._sharing.shares
        if shares is not None:
            distances = {way: rounded(far) for way, far in shares.distances.items()}
            found["shares"] = {"chosen": shares.chosen, "distances": distances}
        if self._blocks is not None:
            found["refined"] = self._blocks.facts()
        if self._norms is not None:
            before, after = rounded(self._norms.before), rounded(self._norms.after)
            found["norms"] = {"renewed": self._norms.is_better, "before": before, "after": after}
        return found

    def _longest_facts(self) -> dict[str, Any]:
        """At least as long as :meth:`facts` will be."""
        ways = dict.fromkeys(WAYS, LONGEST_FIGURE)
        ends = dict.fromkeys(("before", "after"), LONGEST_FIGURE)
        found = self.facts() | {"shares": {"chosen": max(WAYS, key=len), "distances": ways}}
        if self._blocks is not None:
            groups = (name for group in self._study.groups for name in group)
            places = {place for name in groups if (place := self._blocks.home(name)) is not None}
            found["refined"] = {self._study.block(place): ends for place in places}
        return found | {"norms": {"renewed": False, **ends}}

    @property
    def notes(self) -> list[str]:
        """What was read, which layers are fitted by their weights alone, and how far refinement went."""
        reasons = self._study.reasons
        blind = [f"{name.removesuffix('.weight')} ({why})" for name, why in reasons.items()]
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        said = [f"not calibrated, fitted to their weights: {', '.join(blind[:4])}{more}"] if blind else []
        shares = self._sharing.shares
        said += [] if shares is None or self._reached is None else shares.surprise(self._reached)
        return [*self._study.notes, *said, *(self._blocks.notes if self._blocks else ())]

    def fit(
        self, plans: Sequence[LayerPlan], kept: Mapping[str, Callable[[], Fitted]] | None = None
    ) -> Iterator[Fitted]:
        """The layers, in any order; those whose inputs cannot be seen are fitted by their weights, first.

        Args:
            plans: of all layers.
            kept: units of layers that an earlier run has fitted: they are put in their place, and not given.
        """
        kept = kept or {}
        todo = {plan.map.name: plan for plan in plans}
        unseen = [plan for plan in plans if plan.map.name not in {*self.steps.seen, *kept}]
        self._take_up([one for name, one in kept.items() if name not in self.steps.seen])
        fitted = self._group.map(unseen, self._fit_unseen, [plan.cost for plan in unseen])
        for one in fitted:
            self._put(one)
        yield from self._in_block(None, fitted, [])
        for place, groups in self.steps.of(todo):
            names = [name for group in groups for name in group]
            if kept.keys() >= set(names):
                self._take_up([kept[name] for name in names], place)
            else:
                found = [one for group in groups for one in self._fit_group(group, todo, place)]
                yield from self._in_block(place, found, groups)

    def _take_up(self, kept: Sequence[Callable[[], Fitted]], place: BlockPosition | None = None) -> None:
        fitted = [one() for one in kept]
        for one in fitted:
            self._put(one)
        if self._blocks is not None:
            self._blocks.take_up(place, fitted)

    def finish(self) -> dict[str, Tensor]:
        """After the last layer: statistics of batch norms, by their names, where they help."""
        data = self._study.data
        if self._sharing.shares is not None:
            self._reached = self._group.on_main(lambda: self._sharing.distance.of_network(self._compressed))

        def renewed() -> RecalibratedNorms | None:
            return recalibrated_norms(
                self._compressed,
                data.call,
                data.batches,
                lambda network: self._sharing.distance.of_network(network),  # made where there are norms
            )

        self._norms = self._group.on_main(renewed)
        if self._norms is None or not self._norms.is_better:
            return {}
        named = {place: name for name, place in self._study.places.items()}
        found = {named[place]: new for place, new in self._norms.statistics.items() if place in named}
        return {name: new.to(self._checkpoint.read(name)) for name, new in found.items()}

    def _fit_unseen(self, plan: LayerPlan) -> Fitted:
        fitted = fit_layer(self._checkpoint, plan, self._recipe, self._device)
        return replace(fitted, cores=[core.cpu().contiguous() for core in fitted.cores])  # as read back

    def _place(self, group: Sequence[str]) -> BlockPosition | None:
        """The block to refine a group with."""
        homes = {self._blocks.home(name) for name in group} if self._blocks else {None}
        return homes.pop() if len(homes) == 1 else None

    def _in_block(
        self, place: BlockPosition | None, fitted: list[Fitted], groups: list[list[str]]
    ) -> list[Fitted]:
        """The layers of a block, all fitted, refined where that helps; their errors are measured again."""
        if self._blocks is None:
            return fitted
        refined = self._group.on_main(lambda: self._refined(place, fitted))
        if not _have_changed(refined, fitted):
            return refined
        for one in refined:
            self._put(one)
        new = {one.record.name: one for one in refined}
        for group in groups:
            evidence = self._study.evidence(self._compressed, group)
            new |= {name: self._judged(new[name], evidence[name]) for name in group if new[name].cores}
        return list(new.values())

    def _refined(self, place: BlockPosition | None, fitted: list[Fitted]) -> list[Fitted]:
        """As they were where the network is no nearer to the dense one, what follows still dense."""
        assert self._blocks is not None
        refined = self._blocks.refine(place, fitted)
        if not _have_changed(refined, fitted):
            return refined
        distance, before = self._sharing.distance, copy.deepcopy(self._compressed.state_dict())
        far = distance.of_network(self._compressed)
        for one in refined:
            self._put(one)
        if distance.of_network(self._compressed) < far:
            return refined
        self._compressed.load_state_dict(before)
        return self._blocks.taken_back(place, fitted)

    def _judged(self, fitted: Fitted, evidence: Objective) -> Fitted:
        record = fitted.record
        weight = read_finite(self._checkpoint, record.name).to(self._device)
        form = form_of([core.to(self._device) for core in fitted.cores], record.structure)
        judged = judge(weight, form, evidence)
        same_size = {**(record.same_size or {}), "this": judged.felt_error}
        return replace(fitted, record=_with_figures(record, form, judged, same_size))

    def _fit_group(
        self, group: Sequence[str], todo: dict[str, LayerPlan], place: BlockPosition | None
    ) -> list[Fitted]:
        if all(todo[name].is_dense for name in group):
            return [Fitted(todo[name].record()) for name in group]
        evidence = self._study.evidence(self._compressed, group)
        return [self._fit_one(todo[name], evidence[name], place is not None) for name in group]

    def _fit_one(self, plan: LayerPlan, evidence: Objective, apart: bool) -> Fitted:
        """Whatever may fail is in step with the other processes."""
        if plan.is_dense:
            return Fitted(plan.record())
        name = plan.map.name
        with self._group.all_or_raise():
            weight = read_finite(self._checkpoint, name).to(self._device)
        dtype = getattr(torch, plan.stored_dtype)
        seed = zlib.crc32(name.encode()) ^ self._recipe.seed
        storages = self._sharing.storages(plan)
        fit = fit_calibrated(weight, storages, evidence, dtype, seed, apart, self._group)
        with self._group.all_or_raise():
            check_finite_cores(fit.form, weight, self._checkpoint, plan)
            fitted = self._stored(plan, fit)
            self._put(fitted)
        return fitted

    def _stored(self, plan: LayerPlan, fit: CalibratedFit) -> Fitted:
        """The layer with its record; dense where it would not shrink."""
        form = fit.form
        if not self._recipe.allow_growth:
            plan = leave_dense_unless_smaller(plan, form.num_parameters)
        if plan.is_dense:
            return Fitted(plan.record())
        record = replace(
            replace(plan, structure=form.structure).record(),
            num_stored=form.num_parameters,
            **bond_fields(form.structure, form.bonds),
        )
        record = _with_figures(record, form, fit.judged, fit.same_size)
        return Fitted(record, form.cores, self._shifted(plan.map.name, fit.judged.shift))

    def _shifted(self, name: str, shift: Tensor | None) -> dict[str, Tensor]:
        """The bias plus the shift, or the running mean behind the layer less the shift, in its own dtype."""
        taken_up = self._study.means.get(name)
        if shift is None or taken_up is None:
            return {}
        tensor, sign = self._checkpoint.read(taken_up.name), taken_up.sign
        return {taken_up.name: (tensor.double() + sign * shift.to(tensor.device)).to(tensor.dtype)}

    @torch.no_grad()
    def _put(self, fitted: Fitted) -> None:
        """Into the compressed network, what is stored."""
        state = {**dict(self._compressed.named_parameters()), **dict(self._compressed.named_buffers())}
        new = dict(fitted.changed)
        if fitted.cores:
            cores = [core.float() for core in fitted.cores]
            new[fitted.record.name] = form_of(cores, fitted.record.structure).to_weight()
        for name, tensor in new.items():
            if name in self._study.places:
                state[self._study.places[name]].copy_(tensor)


def _have_changed(new: Sequence[Fitted], old: Sequence[Fitted]) -> bool:
    """Whether a core has, or what goes with it; processes do not share tensors, so numbers are compared."""
    return not all(_is_same(one, other) for one, other in zip(new, old, strict=True))


def _is_same(one: Fitted, other: Fitted) -> bool:
    if one.changed.keys() != other.changed.keys():
        return False
    pairs = [*zip(one.cores, other.cores, strict=True)]
    pairs += [(tensor, other.changed[name]) for name, tensor in one.changed.items()]
    return all(torch.equal(a, b) for a, b in pairs)


def _with_figures(
    record: LayerRecord, form: Form, judged: Judgement, same_size: dict[str, float]
) -> LayerRecord:
    return replace(
        record,
        relative_error=rounded(judged.relative_error),
        output_error=rounded(judged.output_error),
        held_out_error=rounded(judged.held_out_error),
        same_size={name: rounded(error) for name, error in same_size.items()},
        entropies=tuple(map(rounded, form.entropies())),
    )
