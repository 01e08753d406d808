"""The plan: form, factors and bonds of every selected layer, as plain data, before any arithmetic.

``--dry-run`` prints the plan, ``compress`` carries it out. Options for single layers are checked here: a
pattern must name a selected layer, a shape or an order must fit one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpoc.compression.budget import (
    Bonds,
    LayerShare,
    bits_within_size,
    bonds_within_size,
    fewest_bits,
    smallest_bonds,
    uniform_bonds,
)
from mpoc.compression.recipe import LayerRule, Recipe
from mpoc.compression.recipe_syntax import network_options
from mpoc.compression.selection import LinearMap, Selection, check_rules
from mpoc.errors import MpocError, UsageError, command_line
from mpoc.io.coded_parts import Rounding
from mpoc.io.manifest import LayerRecord, bond_fields
from mpoc.io.safetensors_header import ITEMSIZE
from mpoc.tensor_networks.factors import LEARNED, MOST_INPUTS, order_fits
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import Geometry
from mpoc.tensor_networks.structure import Structure, lead_outputs_inputs, low_rank_structure, make_structure

# Passes over a weight for reading, checking and moving axes, beside those of the range finder.
_PASSES = 50


@dataclass(frozen=True)
class Dense:
    """The layer is left dense."""

    reason: str = ""


@dataclass(frozen=True)
class BudgetItem:
    """The layer gets a share of a budget that is not allocated yet."""


Goal = Dense | BudgetItem | Truncation


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one selected layer: factorise it to ``structure`` with this goal, or leave it dense."""

    map: LinearMap
    structure: Structure
    stored_dtype: str
    goal: Goal
    learns_order: bool = False  # the order of its inputs is learned from the weight
    rounding: Rounding | None = None  # how what is stored is rounded; None: to floats of ``stored_dtype``

    @property
    def is_dense(self) -> bool:
        """Whether the layer is left dense."""
        return isinstance(self.goal, Dense)

    @property
    def awaits_share(self) -> bool:
        """Whether its bonds depend on a budget that is not allocated yet."""
        return isinstance(self.goal, BudgetItem)

    @property
    def truncation(self) -> Truncation:
        """The truncation of a layer with cores."""
        assert isinstance(self.goal, Truncation)
        return self.goal

    @property
    def cost(self) -> float:
        """Estimated time of the fit, in numbers read: the range finder's passes grow with the bond."""
        bond = self.goal.max_bond if isinstance(self.goal, Truncation) else 0
        return self.structure.num_original * (_PASSES + min(bond, *self.structure.padded))

    @property
    def is_open(self) -> bool:
        """Whether the weight's spectrum decides how far bonds are below the cap."""
        return isinstance(self.goal, Truncation) and self.goal.is_open

    @property
    def awaits_bits(self) -> bool:
        """Whether a budget of bytes is to find the bits of the dense weight."""
        return self.rounding is not None and self.rounding.bits == 0

    @property
    def is_unchanged(self) -> bool:
        """Whether the layer is left as it is: dense, and not rounded."""
        return self.is_dense and self.rounding is None

    def rounded_to(self, bits: float) -> LayerPlan:
        """The same layer with so many bits a number."""
        assert self.rounding is not None
        return replace(self, rounding=replace(self.rounding, bits=bits))

    def left_dense(self, reason: str) -> LayerPlan:
        """The same layer, dense."""
        return replace(self, goal=Dense(reason))

    def record(self) -> LayerRecord:
        """The layer as the report shows it; counts are upper bounds if the spectrum decides, else exact."""
        record = self._float_record()
        return record if self.rounding is None else self.rounding.planned(record)

    def _float_record(self) -> LayerRecord:
        base = LayerRecord(
            name=self.map.name,
            kind=self.map.kind,
            shape=self.map.shape,
            dtype=self.map.dtype,
            form="dense",
            num_original=self.structure.num_original,
            num_stored=self.structure.num_original,
            stored_dtype=self.map.dtype,
            reason=self.goal.reason if isinstance(self.goal, Dense) else "",
            transposed=self.map.transposed and self.rounding is not None,
        )
        if isinstance(self.goal, Dense):
            return base
        bond, rank = (0, 0) if isinstance(self.goal, BudgetItem) else (self.goal.max_bond, self.goal.rank)
        return replace(
            base,
            kind=self.structure.kind,
            form=self.structure.form,
            num_stored=self.structure.num_parameters(bond, rank),
            stored_dtype=self.stored_dtype,
            transposed=self.structure.transposed,
            output_factors=self.structure.output_factors,
            input_factors=self.structure.input_factors,
            **bond_fields(self.structure, self.structure.bonds(bond, rank)),
            padding=self.structure.padding,
            geometry=self.structure.geometry,
            order=LEARNED if self.learns_order else self.structure.order,
        )


def make_plan(
    selection: Selection,
    recipe: Recipe,
    predict_size: Callable[[list[LayerPlan]], int] | None = None,
    geometries: Mapping[str, Geometry] | None = None,
) -> list[LayerPlan]:
    """Decide form, factors and bonds of every chosen layer.

    Args:
        selection: the chosen linear maps.
        recipe: the options, checked.
        predict_size: upper bound on the bytes of the weight files under a plan; needed for ``--size``.
        geometries: geometries of whole maps that a sample run traced, by the weight's name; the recipe has
            the others.

    Raises:
        UsageError: factors do not multiply out, a pattern matches nothing, the budget cannot be met, or the
            options leave no layer to compress.
        MpocError: the checkpoint has no layer to compress.
    """
    if not selection.chosen:
        reasons = Counter(selection.left.values()).most_common(3)
        narrowed = recipe.layers or recipe.exclude or recipe.min_params
        raise (UsageError if narrowed else MpocError)(
            "no layer is left to compress: " + "; ".join(f"{count} {why}" for why, count in reasons),
            "change --layers, --exclude, --embeddings or --min-params",
        )
    check_rules(selection, recipe)
    plans = [_open_plan(map, recipe, geometries or {}) for map in selection.chosen]
    check_shapes_used(plans, recipe)
    if not recipe.allow_growth:
        plans = [_shrinking(plan) for plan in plans]
    if recipe.ratio is not None:
        return _within_ratio(plans, recipe.ratio, recipe.allow_growth)
    if recipe.size is not None:
        assert predict_size is not None
        return _within_size(plans, int(recipe.size), predict_size)
    return plans


def _open_plan(map: LinearMap, recipe: Recipe, geometries: Mapping[str, Geometry]) -> LayerPlan:
    """The plan of a layer by the options that apply to it, before a budget is allocated."""
    rule = recipe.rule_for(map.name)
    try:
        structure = _structure(map, rule, recipe, geometries)
    except UsageError as error:
        raise UsageError(f"shape for layer {map.layer}: {error}", error.hint) from error
    order = recipe.order_for(map.name, map.kind, structure.inputs)
    if order and structure.one_matrix:
        raise UsageError(
            f"--order {order}: the order does not matter to the two factors of {map.layer}", "--form mpo"
        )
    learns = order == LEARNED
    if learns and map.kind != "linear":
        raise UsageError(
            f"--order learned: {map.layer} is a {map.kind}, and only linear layers have an order",
            "use a pattern that names linear layers",
        )
    if learns and structure.inputs > MOST_INPUTS:
        raise UsageError(
            f"--order learned: layer {map.layer} has {structure.inputs:,} inputs, more than {MOST_INPUTS:,}",
            command_line("--order", f"{map.layer}=raster"),
        )
    goal = Dense("the recipe leaves it dense") if rule.dense else _goal(map, structure, rule, recipe)
    storage, bits = recipe.storage_for(map.name)
    if recipe.shares_bits and isinstance(goal, BudgetItem):
        goal = Dense()
        bits = 0 if bits is None and storage != "float" else bits
    if isinstance(goal, Dense) and not rule.dense and (asked := network_options(rule)):
        raise UsageError(
            f"layer {map.layer}: {asked[0]} requires a bond, since layers without one stay dense",
            'bond = 8 beside it, or form = "svd" for all layers',
        )
    if bits is None:
        return LayerPlan(map, structure, recipe.dtype or map.dtype, goal, learns)
    return LayerPlan(map, structure, map.dtype, goal, learns, Rounding(storage, bits))


def _structure(
    map: LinearMap, rule: LayerRule, recipe: Recipe, geometries: Mapping[str, Geometry]
) -> Structure:
    geometry = None
    if recipe.is_map(map.name, map.kind) and not rule.dense:
        geometry = geometries.get(map.name) or recipe.geometry_for(map.name, map.shape)
    kind = map.kind if geometry is None else "convmap"
    _, outputs, inputs = lead_outputs_inputs(kind, map.shape, map.transposed, geometry)
    factors, sites = recipe.factors_for(map.name, outputs, inputs), rule.sites or recipe.sites
    form = _form(rule.form or recipe.form, geometry is not None or sites is not None or rule.bond is not None)
    if FORMS[form].one_matrix:
        if factors is None and geometry is None:
            return low_rank_structure(kind, map.shape, map.transposed)
        form = form if factors is None else "mpo"  # with factors of its own it is an MPO
    if geometry is not None and not FORMS[form].takes_whole_maps:
        raise UsageError(
            f"--form {rule.form or recipe.form} requires --conv kernel: it does not represent whole maps",
            "--conv kernel",
        )
    # A budget is first allocated to the MPO of a sum.
    form = FORMS[form].parts[0] if FORMS[form].parts else form
    order = recipe.order_for(map.name, kind, inputs)
    order = "" if order == LEARNED else order
    return make_structure(kind, map.shape, map.transposed, sites, factors, geometry, form, order)


def _form(asked: str | None, is_chain: bool) -> str:
    """The form that a plan begins with; for ``auto``, the form that the budget is first allocated to."""
    if asked == "auto":
        return "mpo" if is_chain else "svd"
    return asked or "mpo"


def _goal(map: LinearMap, structure: Structure, rule: LayerRule, recipe: Recipe) -> Goal:
    given: LayerRule | Recipe = recipe
    if rule.bond is not None or rule.max_error is not None or rule.discard is not None:
        given = rule
    if (given.max_error is not None or given.discard is not None) and not structure.info.can_truncate:
        option = "--discard" if given.max_error is None else "--max-error"
        raise UsageError(
            f"layer {map.layer}: {option} truncates bonds by their spectrum, which a {structure.info.title} "
            "does not have",
            "--bond 4 or --ratio 0.1, or --form mpo",
        )
    full = structure.full_bond
    if given.max_error is not None:
        return Truncation(full, tolerance=given.max_error)
    if given.discard is not None:
        return Truncation(min(given.bond or full, full), discard=given.discard)
    if given.bond is not None:
        return Truncation(given.bond)
    return BudgetItem() if recipe.has_budget else Dense()


def _within_ratio(plans: list[LayerPlan], ratio: float, allow_growth: bool) -> list[LayerPlan]:
    total = sum(plan.structure.num_original for plan in plans)
    fixed = sum(_most_stored(plan, allow_growth) for plan in plans if not plan.awaits_share)
    bonds = uniform_bonds(_shares(plans), int(ratio * total) - fixed)
    if bonds is None:
        reached = least_ratio(plans, allow_growth)
        within = min(math.ceil(reached * 1.01e4) / 1e4, 1.0)
        raise UsageError(
            f"--ratio {ratio} cannot be reached: with every bond at 1 these layers are at {reached:.4f}",
            f"--ratio {within:.4f}, or leave hard layers out with --exclude",
        )
    return _with_bonds(plans, bonds)


def at_fewest_bits(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans with layers whose bits a budget finds at the fewest; those of other layers as they are."""
    return [
        plan.rounded_to(fewest_bits(plan.rounding.storage)) if plan.rounding and plan.awaits_bits else plan
        for plan in plans
    ]


def left_whole(plans: list[LayerPlan]) -> list[LayerPlan]:
    """The plans with layers that await their bits left as they are."""
    return [_closed(replace(plan, rounding=None), None) if plan.awaits_bits else plan for plan in plans]


def least_ratio(plans: list[LayerPlan], allow_growth: bool) -> float:
    """ρ over all selected layers with every open bond at 1: no budget can be smaller."""
    least = _with_bonds(plans, smallest_bonds(_shares(plans)))
    total = sum(plan.structure.num_original for plan in plans)
    return sum(_most_stored(plan, allow_growth) for plan in least) / total


def _most_stored(plan: LayerPlan, allow_growth: bool) -> int:
    """Upper bound on the parameters of a layer with a goal of its own."""
    dense = plan.is_open and not allow_growth
    return plan.structure.num_original if dense else plan.record().num_stored


def _within_size(
    plans: list[LayerPlan], size: int, predict_size: Callable[[list[LayerPlan]], int]
) -> list[LayerPlan]:
    if any(plan.awaits_bits for plan in plans):
        return _bits_within_size(plans, size, predict_size)
    shares = _shares(plans, in_bytes=True)
    return _with_bonds(
        plans, bonds_within_size(shares, size, lambda bonds: predict_size(_with_bonds(plans, bonds)))
    )


def _bits_within_size(
    plans: list[LayerPlan], size: int, predict_size: Callable[[list[LayerPlan]], int]
) -> list[LayerPlan]:
    """The plans with the same bits for all layers that await theirs; dense if that fits."""
    storage = next(plan.rounding.storage for plan in plans if plan.rounding and plan.awaits_bits)
    if predict_size(whole := left_whole(plans)) <= size:
        return whole

    def planned(bits: float) -> list[LayerPlan]:
        return [plan.rounded_to(bits) if plan.awaits_bits else plan for plan in plans]

    return planned(bits_within_size(storage, size, lambda bits: predict_size(planned(bits))))


def _shares(plans: list[LayerPlan], in_bytes: bool = False) -> list[LayerShare]:
    """The layers that await their share of a budget of parameters, or of bytes."""
    open_plans = [plan for plan in plans if plan.awaits_share]
    if not in_bytes:
        return [LayerShare(plan.structure, 1, 1) for plan in open_plans]
    return [LayerShare(plan.structure, *_costs(plan)) for plan in open_plans]


def _costs(plan: LayerPlan) -> tuple[float, float]:
    """About the bytes of a number of the cores, and of the layer left dense."""
    if plan.rounding is not None:
        return plan.rounding.bits / 8, plan.rounding.bits / 8
    return ITEMSIZE[plan.stored_dtype], ITEMSIZE[plan.map.dtype]


def _with_bonds(plans: list[LayerPlan], bonds: Bonds) -> list[LayerPlan]:
    """The plans, those that await their share with these bonds."""
    remaining = iter(bonds)
    return [_closed(plan, next(remaining)) if plan.awaits_share else plan for plan in plans]


def _closed(plan: LayerPlan, bond: int | None) -> LayerPlan:
    if bond is not None:
        return replace(plan, goal=Truncation(bond))
    shrinks = plan.structure.num_parameters(1) < plan.structure.num_original
    return plan.left_dense("fits the budget uncompressed" if shrinks else "would not shrink even at bond 1")


def _shrinking(plan: LayerPlan) -> LayerPlan:
    """The plan, or a dense one if the cores would not be smaller than the weight.

    A whole map may need smaller bonds than the cap, so its fit decides.
    """
    if plan.is_dense or plan.awaits_share or plan.is_open or plan.structure.geometry is not None:
        return plan
    return leave_dense_unless_smaller(plan, plan.record().num_stored)


def leave_dense_unless_smaller(plan: LayerPlan, num_stored: int) -> LayerPlan:
    """``plan``, or the layer left dense, with the reason, if ``num_stored`` is not smaller."""
    original = plan.structure.num_original
    if num_stored < original:
        return plan
    cut = plan.truncation
    goal = f"bond {cut.max_bond}"
    if cut.is_open:
        goal = f"error {cut.tolerance:g}" if cut.tolerance else f"discarded weight {cut.discard:g}"
    return plan.left_dense(f"would not shrink at {goal}: {original:,} → {num_stored:,} (--allow-growth)")


def check_shapes_used(plans: list[LayerPlan], recipe: Recipe) -> None:
    """Check that every ``--shape`` or ``--order`` without a pattern fits a layer.

    Raises:
        UsageError: one fits no layer.
    """
    for rule in recipe.order:
        linear = (plan.structure.inputs for plan in plans if plan.map.kind == "linear")
        if rule.pattern is None and not any(order_fits(rule.order, inputs) for inputs in linear):
            raise UsageError(f"--order {rule.order}: no selected linear layer has that number of inputs")
    for shape in recipe.shape:
        if shape.pattern is not None:
            continue
        fits = any(
            (shape.output_factors, shape.input_factors)
            == tuple(
                side[plan.structure.lead_sites :]
                for side in (plan.structure.output_factors, plan.structure.input_factors)
            )
            for plan in plans
        )
        if not fits:
            text = ":".join("x".join(map(str, side)) for side in (shape.input_factors, shape.output_factors))
            raise UsageError(f"--shape {text}: fits no selected layer's inputs and outputs")
