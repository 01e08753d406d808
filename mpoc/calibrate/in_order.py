"""Fit layers in the order of the network, each on the inputs that those before it, compressed, really give.

Two copies of the network run side by side, one dense, one that gets the compressed weights as they are
found.  What a layer's error does to the mean of its outputs is taken up by its bias, or by the running mean
of the batch norm right behind it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpoc.calibrate.evidence import Evidence, one_matrix
from mpoc.calibrate.fit import CalibratedFit, Storage, fit_calibrated
from mpoc.calibrate.norms import Renewed, renewed_norms
from mpoc.calibrate.outputs import OutputDistance
from mpoc.calibrate.share import Costs, Offers, Shares, share_by_gain, storage_of
from mpoc.calibrate.study import Study
from mpoc.checkpoint import Checkpoint
from mpoc.factors import wide_factors
from mpoc.fitting import Fitted, check_cores, fit_layer, read_finite, rounded
from mpoc.forms.chains import weight_of
from mpoc.header import ITEMSIZE
from mpoc.manifest import LayerRecord
from mpoc.plan import LayerPlan, leave_dense_unless_smaller
from mpoc.recipe import Recipe
from mpoc.structure import Structure, lead_outputs_inputs, low_rank_structure, make_structure

_ATTEMPTS = 3  # at shares whose file, names and all, is within a ceiling


class InOrder:
    """The calibrated fit of a checkpoint.

    Args:
        study: of the network and the calibration data.
        checkpoint: that is compressed.
        recipe: its options.
        device: to compute on.
    """

    def __init__(self, study: Study, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
        self._study, self._checkpoint, self._recipe, self._device = study, checkpoint, recipe, device
        self._compressed = copy.deepcopy(study.network)
        self._shares: Shares | None = None
        self._norms: Renewed | None = None

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
        offers = {plan.map.name: self._offers(plan) for plan in takes_part}
        if ratio is not None:
            total = sum(plan.structure.num_original for plan in plans)
            others = sum(plan.record().num_stored for plan in plans if plan.map.name not in offers)
            costs, budget = dict.fromkeys(offers, Costs()), int(ratio * total) - others
            self._shares = share_by_gain(plans, offers, costs, budget, self._distance)
        if size is not None:
            self._shares = self._within_size(plans, offers, size, predict_size)
        return plans if self._shares is None else self._shares.plans

    def _within_size(
        self,
        plans: list[LayerPlan],
        offers: dict[str, Offers],
        size: int,
        predict_size: Callable[[list[LayerPlan]], int],
    ) -> Shares | None:
        """Shares of bytes; None where names and headers take too many."""
        costs = {plan.map.name: _bytes(plan) for plan in plans if plan.map.name in offers}
        budget = sum(costs[plan.map.name].of(plan) for plan in plans if plan.map.name in offers)
        budget += size - predict_size(plans)
        for _ in range(_ATTEMPTS):
            shares = share_by_gain(plans, offers, costs, budget, self._distance)
            excess = predict_size(shares.plans) - size
            if excess <= 0:
                return shares
            budget -= excess
        return None

    def _offers(self, plan: LayerPlan) -> Offers:
        """Those of the layer, the same for every budget."""
        name, forms = plan.map.name, self._forms(plan)
        kept: dict[Any, Offers] = self._study.kept
        key = name, forms, plan.structure if self._has_own_factors(plan) else None
        if key not in kept:
            kept[key] = Offers(
                one_matrix(self._weight(plan), plan.structure.kind, plan.structure.transposed),
                self._mpo_structure(plan),
                self._study.dense_evidence(name),
                forms,
            )
        return kept[key]

    def facts(self) -> dict[str, Any]:
        """For the manifest: the data, and how the budget was shared out."""
        study = self._study
        found = {**study.facts(), "reasons": study.reasons}
        if self._shares is not None:
            distances = {way: rounded(found) for way, found in self._shares.distances.items()}
            found["shares"] = {"chosen": self._shares.chosen, "distances": distances}
        if self._norms is not None:
            before, after = rounded(self._norms.before), rounded(self._norms.after)
            found["norms"] = {"renewed": self._norms.is_better, "before": before, "after": after}
        return found

    @property
    def notes(self) -> list[str]:
        """What was read, and which layers are fitted by their weights alone."""
        reasons = self._study.reasons
        blind = [f"{name.removesuffix('.weight')} ({why})" for name, why in reasons.items()]
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        said = [f"fitted by their weights alone: {', '.join(blind[:4])}{more}"] if blind else []
        return [*self._study.data.notes, *said]

    def _forms(self, plan: LayerPlan) -> tuple[str, ...]:
        form = self._recipe.rule_for(plan.map.name).form or self._recipe.form
        if form == "auto" and not self._has_own_factors(plan):
            return ("svd", "mpo", "svd+mpo")
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

    def _mpo_structure(self, plan: LayerPlan) -> Structure:
        one = plan.structure
        if self._has_own_factors(plan):
            return one
        _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
        factors = wide_factors(outputs, inputs)
        return make_structure(one.kind, one.shape, one.transposed, None, factors)

    def _weight(self, plan: LayerPlan) -> Tensor:
        return read_finite(self._checkpoint, plan.map.name).to(self._device)

    def fit(self, plans: Sequence[LayerPlan]) -> Iterator[Fitted]:
        """The layers, in any order; those whose inputs cannot be seen are fitted by their weights, first."""
        todo = {plan.map.name: plan for plan in plans}
        seen = [[name for name in group if name in todo] for group in self._study.groups]
        known = {name for group in seen for name in group}
        for plan in plans:
            if plan.map.name not in known:
                fitted = fit_layer(self._checkpoint, plan, self._recipe, self._device)
                self._put(fitted)
                yield fitted
        for group in filter(None, seen):
            if all(todo[name].max_bond is None for name in group):
                yield from (Fitted(todo[name].record()) for name in group)
                continue
            evidence = self._study.evidence(self._compressed, group)
            for name in group:
                yield self._fit_one(todo[name], evidence[name])

    def finish(self) -> dict[str, Tensor]:
        """After the last layer: statistics of batch norms, by their names, where they help."""
        data = self._study.data
        self._norms = renewed_norms(self._compressed, data.call, data.batches, self._distance)
        if self._norms is None or not self._norms.is_better:
            return {}
        named = {place: name for name, place in self._study.places.items()}
        found = {named[place]: new for place, new in self._norms.statistics.items() if place in named}
        return {name: new.to(self._checkpoint.read(name)) for name, new in found.items()}

    @cached_property
    def _distance(self) -> OutputDistance:
        return OutputDistance(self._study)

    def _fit_one(self, plan: LayerPlan, evidence: Evidence) -> Fitted:
        if plan.max_bond is None:
            return Fitted(plan.record())
        name = plan.map.name
        weight = self._weight(plan)
        dtype = getattr(torch, plan.stored_dtype)
        seed = zlib.crc32(name.encode()) ^ self._recipe.seed
        fit = fit_calibrated(weight, self._storages(plan), evidence, dtype, seed)
        check_cores(fit.cores, self._checkpoint, plan)
        if not self._recipe.allow_growth:
            plan = leave_dense_unless_smaller(plan, sum(core.numel() for core in fit.cores))
        if plan.max_bond is None:
            return Fitted(plan.record())
        fitted = Fitted(_record(plan, fit), fit.cores, self._shifted(name, fit.shift))
        self._put(fitted)
        return fitted

    def _storages(self, plan: LayerPlan) -> list[Storage]:
        """The plan's, and where the form is open two factors of the same size."""
        planned = storage_of(plan)
        if "svd" not in self._forms(plan) or planned.structure.form == "svd":
            return [planned]
        one = plan.structure
        two = low_rank_structure(one.kind, one.shape, one.transposed)
        rank = planned.num_parameters // two.num_parameters(1)
        return [planned, Storage(two, rank)] if rank else [planned]

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
            new[fitted.record.name] = _weight(fitted)
        for name, tensor in new.items():
            if name in self._study.places:
                state[self._study.places[name]].copy_(tensor)


def _bytes(plan: LayerPlan) -> Costs:
    return Costs(ITEMSIZE[plan.stored_dtype], ITEMSIZE[plan.map.dtype])


def _weight(fitted: Fitted) -> Tensor:
    return weight_of([core.float() for core in fitted.cores], fitted.record.structure)


def _record(plan: LayerPlan, fit: CalibratedFit) -> LayerRecord:
    form, *others = fit.terms
    plan = replace(plan, structure=form.structure, low_rank=others[0].bonds[1] if others else 0)
    return replace(
        plan.record(),
        num_stored=sum(core.numel() for core in fit.cores),
        bonds=form.bonds,
        relative_error=rounded(fit.relative_error),
        output_error=rounded(fit.output_error),
        held_out_error=rounded(fit.held_out_error),
        same_size={name: rounded(error) for name, error in fit.same_size.items()},
        entropies=() if others else tuple(map(rounded, form.entropies())),
    )
