"""Whether what is asked for single layers is of use: patterns that name them, shapes and orders that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpoc.errors import UsageError
from mpoc.orders import order_fits
from mpoc.recipe import Recipe
from mpoc.selection import Selection, check_pattern, matches

if TYPE_CHECKING:
    from mpoc.plan import LayerPlan


def check_rules(selection: Selection, recipe: Recipe) -> None:
    """Every pattern must name a weight that was chosen.

    Raises:
        UsageError: one does not.
    """
    chosen = [map.name for map in selection.chosen]
    given = [("[layer] pattern", rule.pattern) for rule in recipe.rules]
    given += [("--shape pattern", shape.pattern) for shape in recipe.shape if shape.pattern is not None]
    given += [("--order pattern", order.pattern) for order in recipe.order if order.pattern is not None]
    shapes = (("--input-shape pattern", shape.pattern) for shape in recipe.input_shape)
    given += [(option, pattern) for option, pattern in shapes if pattern is not None]
    for option, pattern in given:
        check_pattern(option, pattern, [*chosen, *selection.left])
        if not any(matches(pattern, name) for name in chosen):
            name = next(name for name in selection.left if matches(pattern, name))
            raise UsageError(f"{option} {pattern!r}: {name} is left alone ({selection.left[name]})")


def check_shapes_used(plans: list[LayerPlan], recipe: Recipe) -> None:
    """A ``--shape`` or ``--order`` without a pattern must fit some layer.

    Raises:
        UsageError: one does not.
    """
    for rule in recipe.order:
        linear = (plan.structure.inputs for plan in plans if plan.map.kind == "linear")
        if rule.pattern is None and not any(order_fits(rule.order, inputs) for inputs in linear):
            raise UsageError(f"--order {rule.order}: no selected linear layer has so many inputs")
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
            raise UsageError(f"--shape {text}: multiplies out to no selected layer's sides")
