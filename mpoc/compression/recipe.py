"""The recipe: all options of a compression, from the command line and a TOML file, as one plain object.

A recipe file holds the options' own names, and tables for single layers, of which later ones win:

    bond = 8
    exclude = ["conv1"]

    [layer."layer3.*"]
    bond = 16
    sites = 3

    [layer.linear]
    dense = true
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpoc.compression.recipe_syntax import (
    InputShape,
    ShapeRule,
    check_bond,
    check_conv,
    check_form,
    check_rule,
    check_share,
    check_sites,
    check_storage,
    geometry_at,
    network_options,
    parse_budget,
    parse_input_shape,
    parse_shape,
    parse_share,
    read_recipe,
)
from mpoc.compression.selection import check_regular_expressions, matches
from mpoc.errors import UsageError, nearest
from mpoc.runtime.formatting import parse_size
from mpoc.runtime.options import ADVANCED, option
from mpoc.tensor_networks.factors import OrderRule, order_fits, parse_order
from mpoc.tensor_networks.geometry import Geometry

STORED_DTYPES = ("float64", "float32", "bfloat16", "float16")
EFFORTS = ("fast", "balanced", "thorough")
DEFAULT_EFFORT = "balanced"
GOALS = ("bond", "discard", "ratio", "max_error", "size", "max_drop")
GOAL = "Goal (exactly one; --bond may cap --discard, --bits go with any)"
_LAYERS = f"{ADVANCED}: which layers"
# Where a later rule sets one of these, it takes back what earlier ones say of the others.
_TOGETHER = (("bond", "max_error", "discard", "dense"), ("form", "sites", "shape"), ("bits", "storage"))


@dataclass(frozen=True)
class LayerRule:
    """Options for the layers that a pattern matches; None: as for all layers."""

    pattern: str
    bond: int | None = None
    max_error: float | None = None
    discard: float | None = None
    form: str | None = None
    sites: int | None = None
    shape: ShapeRule | None = None
    order: OrderRule | None = None
    conv: str | None = None
    input_shape: InputShape | None = None
    dense: bool | None = None
    bits: int | None = None
    storage: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All options of a compression.

    Exactly one goal is set, but ``bond`` may cap ``discard``, and a trial of ``max_drop`` has its ``ratio``
    too. ``bits`` alone leave every layer dense and round its weight; beside a goal they round the cores.
    ``form`` None means ``auto`` for a calibrated budget, else ``mpo``; ``dtype`` None means each
    weight's own.
    """

    bond: int | None = option("Cap every bond dimension D.", None, panel=GOAL)
    ratio: float | None = option(
        "Keep at most this share ρ of the selected layers' parameters.",
        None,
        panel=GOAL,
        metavar="FLOAT",
        parse=parse_share,
    )
    max_error: float | None = option(
        "Keep each layer's relative error below this.", None, panel=GOAL, metavar="FLOAT", parse=parse_share
    )
    discard: float | None = option(
        "Cut at most this share of Σs² at each bond; --bond may cap it.", None, panel=GOAL
    )
    size: int | float | None = option(
        "Write weight files of at most 20MB, or of 25% of the source's.",
        None,
        panel=GOAL,
        metavar="SIZE",
        parse=parse_budget,
    )
    max_drop: float | None = option(
        "Find the smallest output that loses at most this of the metric (--eval).", None, panel=GOAL
    )
    bits: int | None = option("Round numbers to 2, 3, 4, 5, 6 or 8 bits.", None, panel=GOAL)
    layers: tuple[str, ...] = option(
        "Compress only layers that match: glob, or re:REGEX. Repeatable.",
        (),
        metavar="PATTERN",
        panel=_LAYERS,
        repeated=True,
    )
    exclude: tuple[str, ...] = option(
        "Leave layers that match alone. Repeatable.", (), metavar="PATTERN", panel=_LAYERS, repeated=True
    )
    embeddings: bool | None = option(
        "Compress embeddings too.",
        None,
        "--embeddings/--no-embeddings",
        panel=_LAYERS,
        shown="not; yes with --size or --max-drop",
    )
    min_params: int = option("Leave weights with fewer parameters alone.", 0, panel=_LAYERS)
    allow_growth: bool = option(
        "Factorise layers even where the cores are larger than the weight.",
        False,
        "--allow-growth/--no-allow-growth",
        panel=_LAYERS,
    )
    form: str | None = option(
        "Choose mpo, svd, tree, mera, svd+mpo or auto.",
        None,
        metavar="FORM",
        panel=ADVANCED,
        shown="mpo; calibrated auto",
    )
    effort: str | None = option(
        "Try few, the usual or all forms of a calibrated layer.",
        None,
        metavar="fast|balanced|thorough",
        panel=ADVANCED,
        shown=DEFAULT_EFFORT,
    )
    sites: int | None = option(
        "Set the MPO sites per layer, without kernel taps.",
        None,
        panel=ADVANCED,
        shown="4 or 5",
    )
    shape: tuple[ShapeRule, ...] = option(
        "Set factors, as fc1=4x7x7x4:4x4x4x4. Repeatable.",
        (),
        metavar="[PATTERN=]IN:OUT",
        panel=ADVANCED,
        parse=parse_shape,
        repeated=True,
    )
    order: tuple[OrderRule, ...] = option(
        "Order a linear layer's inputs: raster, morton:[Cx]HxW or learned. Repeatable.",
        (),
        metavar="[PATTERN=]ORDER",
        panel=ADVANCED,
        parse=parse_order,
        repeated=True,
    )
    conv: str = option(
        "Factorise a convolution's kernel, or its whole map (see --input-shape).",
        "kernel",
        metavar="kernel|map",
        panel=ADVANCED,
    )
    input_shape: tuple[InputShape, ...] = option(
        "Give a whole map's input size and settings, as conv1=32x32:stride=2. Repeatable.",
        (),
        metavar="[PATTERN=]HxW[:…]",
        panel=ADVANCED,
        parse=parse_input_shape,
        repeated=True,
    )
    dtype: str | None = option(
        "Store cores in float32, bfloat16 or another dtype.",
        None,
        panel=ADVANCED,
        shown="each weight's own",
    )
    storage: str | None = option(
        "Store numbers on a grid, entropy-coded or as floats.",
        None,
        metavar="grid|coded|float",
        panel=ADVANCED,
        shown="grid; coded with --size",
    )
    device: str = option("Compute on auto, cpu, cuda, cuda:1, …", "auto", panel=ADVANCED)
    seed: int = option("Seed the randomised range finder.", 0, panel=ADVANCED)
    max_shard_size: int = option(
        "Limit each weight file of a directory.",
        5 * 10**9,
        metavar="SIZE",
        panel=ADVANCED,
        parse=parse_size,
        shown="5GB",
    )
    rules: tuple[LayerRule, ...] = ()

    def with_form(self, calibrated: bool) -> Recipe:
        """This recipe with a form where none was asked for.

        Raises:
            UsageError: a form, or a goal, that needs or excludes calibration.
        """
        forms = (self.form, *(rule.form for rule in self.rules))
        for form in (form for form in ("auto", "svd+mpo") if form in forms):
            if not calibrated:
                hint = "--calibrate DATA"
                raise UsageError(f"--form {form} requires --calibrate: it compares what layers do", hint)
            if not self.has_budget:
                hint = "--ratio 0.5"
                raise UsageError(f"--form {form} requires a budget: --ratio or --size", hint)
        if self.effort is not None and not calibrated:
            raise UsageError("--effort requires --calibrate", "--calibrate DATA")
        if calibrated and (self.order or any(rule.order for rule in self.rules)):
            raise UsageError("--order excludes --calibrate, which fits inputs in their own order")
        for goal in ("max_error", "discard"):
            values = (getattr(goals, goal) for goals in (self, *self.rules))
            if calibrated and any(value is not None for value in values):
                name = f"--{goal.replace('_', '-')}"
                raise UsageError(
                    f"{name} limits the error of weights, and excludes --calibrate: "
                    "use --ratio, --size or --max-drop",
                    "--ratio 0.5",
                )
        effort = self.effort or (DEFAULT_EFFORT if calibrated else None)
        if self._rounds_to_size:
            tables = not self.layers if self.embeddings is None else self.embeddings
            storage = self.storage or "coded"
            return replace(self, effort=effort, form="mpo", storage=storage, embeddings=tables)
        usual = "auto" if calibrated and self.has_budget else "mpo"
        return replace(self, effort=effort, form=self.form or usual)

    def with_bytes_of(self, source: int) -> Recipe:
        """This recipe with a size in bytes where it is a share of the ``source`` bytes of weight files."""
        return replace(self, size=int(self.size * source)) if isinstance(self.size, float) else self

    @property
    def _rounds_to_size(self) -> bool:
        """Whether a budget of bytes is met by rounding: no form, order, bits or dtype is asked for."""
        asked = network_options(self) or self.bits or self.dtype or self.storage == "float"
        return self.may_be_of_bytes and not asked

    @property
    def shares_bits(self) -> bool:
        """Whether layers without bits of their own get them from a budget of bytes."""
        return self.may_be_of_bytes and self.bits is None and self.storage in ("grid", "coded")

    @property
    def may_be_of_bytes(self) -> bool:
        """Whether the goal is a size, or a drop, for which sizes are searched."""
        return self.size is not None or self.max_drop is not None

    @property
    def has_budget(self) -> bool:
        """Whether one goal is shared among all layers."""
        return any(goal is not None for goal in (self.ratio, self.size, self.max_drop))

    def rule_for(self, name: str) -> LayerRule:
        """The rules that match ``name``, merged; later ones win."""
        merged = LayerRule(name)
        for rule in self.rules:
            if not matches(rule.pattern, name):
                continue
            given = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name != "pattern"}
            given = {key: value for key, value in given.items() if value is not None}
            for group in _TOGETHER:
                if given.keys() & set(group):
                    given = dict.fromkeys(group) | given
            merged = replace(merged, **given)
        return merged

    def storage_for(self, name: str) -> tuple[str, int | None]:
        """How the numbers of this layer are stored, and their bits.

        ``("float", None)``: they are not rounded. Another storage without bits: a budget of bytes finds them.
        """
        rule = self.rule_for(name)
        bits = rule.bits or self.bits
        wanted = None if rule.bits and self.storage == "float" else self.storage
        storage = rule.storage or wanted or ("grid" if bits else "float")
        return (storage, None) if storage == "float" else (storage, bits)

    def order_for(self, name: str, kind: str, inputs: int) -> str:
        """The order asked for this layer's inputs; ``""``: as they are."""
        own = self.rule_for(name).order
        if own is not None:
            return own.order
        for rule in reversed(self.order):
            if rule.pattern is not None and matches(rule.pattern, name):
                return rule.order
            if rule.pattern is None and kind == "linear" and order_fits(rule.order, inputs):
                return rule.order
        return ""

    def is_map(self, name: str, kind: str) -> bool:
        """Whether this weight is a convolution to be compressed as one map."""
        return kind.startswith("conv") and (self.rule_for(name).conv or self.conv) == "map"

    def has_input_shape(self, name: str) -> bool:
        """Whether :meth:`geometry_for` knows the input size of this convolution."""
        given = (shape.pattern for shape in self.input_shape)
        return self.rule_for(name).input_shape is not None or any(
            p is None or matches(p, name) for p in given
        )

    def geometry_for(self, name: str, shape: tuple[int, ...]) -> Geometry:
        """The geometry of a convolution that is compressed as one map, whose kernel has this shape.

        Raises:
            UsageError: no input shape matches, or it does not fit the kernel.
        """
        own = self.rule_for(name).input_shape
        return geometry_at(name, shape, self.input_shape if own is None else (own,))

    def factors_for(
        self, name: str, outputs: int, inputs: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Output and input factors asked for this layer; None: choose them."""
        own = self.rule_for(name).shape
        if own is not None:
            return own.output_factors, own.input_factors
        for rule in reversed(self.shape):
            if rule.pattern is not None and matches(rule.pattern, name):
                return rule.output_factors, rule.input_factors
        for rule in reversed(self.shape):
            if rule.pattern is None and _fits(rule, outputs, inputs):
                return rule.output_factors, rule.input_factors
        return None


def _fits(rule: ShapeRule, outputs: int, inputs: int) -> bool:
    return (math.prod(rule.output_factors), math.prod(rule.input_factors)) == (outputs, inputs)


def make_recipe(file: Path | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe file and the command line's options (None: not given), which win, as one checked recipe.

    Raises:
        UsageError: unknown or badly typed keys, values out of range, no goal or several.
    """
    values, tables = ({}, {}) if file is None else read_recipe(file, Recipe, LayerRule)
    rules = tuple(LayerRule(pattern, **table) for pattern, table in tables.items())
    given = {key: value for key, value in options.items() if value is not None}
    if any(goal in given for goal in GOALS):
        values = {key: value for key, value in values.items() if key not in GOALS}
    recipe = Recipe(**(values | given), rules=rules)
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be carried out.

    Raises:
        UsageError: values out of range, no goal or several.
    """
    _check_goals(recipe)
    check_bond("--bond", recipe.bond)
    check_share("--max-error", recipe.max_error)
    check_share("--discard", recipe.discard)
    check_sites("--sites", recipe.sites)
    if recipe.ratio is not None and not 0 < recipe.ratio <= 1:
        raise UsageError(f"--ratio {recipe.ratio}: must be above 0 and at most 1")
    if recipe.size is not None and recipe.size <= 0:
        raise UsageError(f"--size {recipe.size}: must be above 0")
    if isinstance(recipe.size, float) and recipe.size > 1:
        raise UsageError(f"--size {recipe.size}: neither bytes nor a share", "write it as 20MB or 25%")
    if recipe.max_drop is not None and not 0 <= recipe.max_drop < math.inf:
        raise UsageError(f"--max-drop {recipe.max_drop}: must be finite and at least 0")
    if not 0 <= recipe.seed < 2**63:
        raise UsageError(f"--seed {recipe.seed}: must lie between 0 and 2^63 - 1")
    if recipe.min_params < 0:
        raise UsageError(f"--min-params {recipe.min_params}: must not be negative")
    if recipe.max_shard_size <= 0:
        raise UsageError(f"--max-shard-size {recipe.max_shard_size}: must be above 0")
    for name, value, known in (("dtype", recipe.dtype, STORED_DTYPES), ("effort", recipe.effort, EFFORTS)):
        if value is not None and value not in known:
            raise UsageError(f"--{name} {value!r}: not one of {', '.join(known)}{nearest(value, known)}")
    check_storage("--", recipe.storage, recipe.bits, recipe.may_be_of_bytes and not network_options(recipe))
    forms = [recipe.conv, *(rule.conv for rule in recipe.rules if rule.conv)]
    check_conv(forms, bool(recipe.input_shape) or any(rule.input_shape for rule in recipe.rules))
    every = (recipe.rules, recipe.shape, recipe.order, recipe.input_shape)
    check_regular_expressions(rule.pattern or "" for rules in every for rule in rules)
    check_form("--form", recipe.form, recipe.sites)
    of_size = recipe.storage or "coded" if recipe.may_be_of_bytes else None
    for rule in recipe.rules:
        check_rule(f"layer {rule.pattern!r}:", rule)
        bits = rule.bits if rule.storage == "float" else rule.bits or recipe.bits
        check_storage(f"layer {rule.pattern!r}: ", rule.storage, bits, rule.storage == of_size)


def _check_goals(recipe: Recipe) -> None:
    goals = [goal for goal in GOALS if getattr(recipe, goal) is not None]
    by_bits = not goals and recipe.bits is not None
    if by_bits and (asked := network_options(recipe)):
        raise UsageError(f"--{asked[0]}: --bits alone leave layers dense", "add --bond or --ratio")
    if len(goals) != 1 and goals != ["bond", "discard"] and not by_bits:
        given = " and ".join("--" + goal.replace("_", "-") for goal in goals) or "none of them"
        raise UsageError(
            "exactly one of --bond, --discard, --ratio, --max-error, --size and --max-drop is needed (--bond "
            f"may cap --discard), or --bits; given: {given}",
            "mpoc compress MODEL --ratio 0.5",
        )
