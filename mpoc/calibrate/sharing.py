"""Which layers of a calibrated compression share its budget, in which forms, and within which ceiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from mpoc.calibrate.choices import Choices, costs_of
from mpoc.calibrate.evidence import one_matrix
from mpoc.calibrate.fit import Storage
from mpoc.calibrate.gain import Costs, Shares, share_by_gain
from mpoc.calibrate.offers import Offers, storage_of
from mpoc.calibrate.outputs import OutputDistance
from mpoc.calibrate.shares_file import kept_or_shared
from mpoc.calibrate.study import Study
from mpoc.checkpoint import Checkpoint
from mpoc.errors import UsageError
from mpoc.factors import wide_factors
from mpoc.finished import in_order_key
from mpoc.fitting import read_finite
from mpoc.header import ITEMSIZE
from mpoc.plan import LayerPlan
from mpoc.recipe import Recipe
from mpoc.structure import Structure, lead_outputs_inputs, make_structure

_ATTEMPTS = 3  # at shares whose file, names and all, is within a ceiling


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
        if self._recipe.ratio is None and self._recipe.size is None:
            return plans
        folder = self._study.folder
        if folder is None:
            self.shares = self._found(plans, predict_size)
        else:
            key = in_order_key(self._study.fingerprint, self._checkpoint, plans, self._recipe)
            found = partial(self._found, plans, predict_size)
            self.shares = kept_or_shared(folder / "shares.json", key, plans, found, self._study.mates)
        return self.shares.plans

    def _found(self, plans: list[LayerPlan], predict_size: Callable[[list[LayerPlan]], int]) -> Shares:
        known = {name for group in self._study.groups for name in group}
        takes_part = [p for p in plans if p.map.name in known and self._has_no_goal_of_its_own(p)]
        mates = self._study.mates
        with mates.together():
            distance = self.distance
        offers = partial(self._offers, count=len(mates.share(costs_of(takes_part))))
        choices = Choices(takes_part, offers, mates)
        if self._recipe.size is not None:
            return self._within_size(plans, choices, self._recipe.size, predict_size)
        assert self._recipe.ratio is not None
        total = sum(plan.structure.num_original for plan in plans)
        others = sum(plan.record().num_stored for plan in plans if plan.map.name not in choices.every)
        costs, budget = dict.fromkeys(choices.every, Costs()), int(self._recipe.ratio * total) - others
        return share_by_gain(plans, choices, costs, budget, distance)

    def _within_size(
        self,
        plans: list[LayerPlan],
        choices: Choices,
        size: int,
        predict_size: Callable[[list[LayerPlan]], int],
    ) -> Shares:
        """Shares of bytes.

        Raises:
            UsageError: nothing so small is found.
        """
        costs = {plan.map.name: _bytes(plan) for plan in plans if plan.map.name in choices.every}
        budget = sum(costs[plan.map.name].of(plan) for plan in plans if plan.map.name in costs)
        budget += size - predict_size(plans)
        for _ in range(_ATTEMPTS):
            shares = share_by_gain(plans, choices, costs, budget, self.distance)
            excess = predict_size(shares.plans) - size
            if excess <= 0:
                return shares
            budget -= excess
        raise UsageError(
            f"--size {size}: too small for what calibration records of each layer", "a larger --size"
        )

    def _offers(self, plan: LayerPlan, count: int) -> Offers:
        """Those of one of so many layers of this process, the same for every budget."""
        name, forms = plan.map.name, self._forms(plan)
        kept: dict[Any, Offers] = self._study.kept
        key = name, forms, plan.structure if self._has_own_factors(plan) else None
        if key not in kept:
            if self._study.tell:
                self._study.tell(
                    "what each form would cost: layer", len(kept) + 1, -(-count // self._study.mates.size)
                )
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


def _bytes(plan: LayerPlan) -> Costs:
    return Costs(ITEMSIZE[plan.stored_dtype], ITEMSIZE[plan.map.dtype])
