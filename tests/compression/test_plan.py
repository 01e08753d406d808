"""The plan: goals, rules of single layers, ceilings that hold."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.plan import LayerPlan, leave_dense_unless_smaller, make_plan
from mpoc.compression.recipe import LayerRule, Recipe, make_recipe
from mpoc.compression.recipe_syntax import ShapeRule, parse_input_shape, parse_shape
from mpoc.compression.selection import LinearMap, Selection, select
from mpoc.errors import MpocError, UsageError
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.io.safetensors_header import ITEMSIZE
from mpoc.tensor_networks.structure import make_structure

SOME = settings(max_examples=60, deadline=None, derandomize=True)

NETWORK = [
    LinearMap("conv1.weight", "conv2d", (16, 3, 3, 3), "float32", False),
    LinearMap("conv2.weight", "conv2d", (64, 32, 3, 3), "float32", False),
    LinearMap("fc1.weight", "linear", (256, 784), "float32", False),
    LinearMap("fc2.weight", "linear", (10, 256), "float16", False),
]


def selection(*maps: LinearMap) -> Selection:
    return Selection(list(maps), {}, "names and shapes")


def plan(maps: list[LinearMap], rules: tuple[LayerRule, ...] = (), **options: Any) -> dict[str, LayerPlan]:
    plans = make_plan(selection(*maps), Recipe(**options, rules=rules), size_with_text)
    return {plan.map.layer: plan for plan in plans}


def ratio_of(plans: list[LayerPlan]) -> float:
    """Eq. (9) over all selected layers."""
    records = [plan.record() for plan in plans]
    return sum(r.num_stored for r in records) / sum(r.num_original for r in records)


def size_with_text(plans: list[LayerPlan]) -> int:
    """Bytes of the data and of a text whose length depends on the bonds, as a manifest's does."""
    records = [plan.record() for plan in plans]
    text = sum(len(str(record.bonds)) for record in records)
    return 1000 + text + sum(r.num_stored * ITEMSIZE[r.stored_dtype] for r in records)


_SIDE = st.integers(1, 200)
MAPS = st.lists(
    st.one_of(
        st.tuples(st.just("linear"), st.tuples(_SIDE, _SIDE)),
        st.tuples(st.just("conv2d"), st.tuples(_SIDE, _SIDE, st.just(3), st.just(3))),
    ),
    min_size=1,
    max_size=5,
).map(lambda ws: [LinearMap(f"l{k}.weight", w[0], w[1], "float32", False) for k, w in enumerate(ws)])


def test_bond_caps_every_layer() -> None:
    for layer in plan(NETWORK, bond=4).values():
        structure = make_structure(layer.map.kind, layer.map.shape)
        record = layer.record()
        assert (record.form, record.bonds) == ("mpo", structure.bonds(4))
        assert record.num_stored == structure.num_parameters(4) < record.num_original
        assert (record.output_factors, record.input_factors) == (
            structure.output_factors,
            structure.input_factors,
        )


def test_records_keep_the_source_and_the_stored_dtype() -> None:
    own, asked = (
        plan(NETWORK, bond=4)["fc2"].record(),
        plan(NETWORK, bond=4, dtype="bfloat16")["fc2"].record(),
    )
    assert (own.dtype, own.stored_dtype) == ("float16", "float16")
    assert (asked.dtype, asked.stored_dtype) == ("float16", "bfloat16")


def test_layer_that_would_grow_stays_dense_with_a_reason() -> None:
    layer = plan(NETWORK, bond=64)["fc2"]
    grown = layer.structure.num_parameters(64)
    assert layer.is_dense and grown >= 2560
    assert layer.record().reason == f"would not shrink at bond 64: 2,560 → {grown:,} (--allow-growth)"
    record = layer.record()
    assert (record.form, record.num_stored, record.bonds) == ("dense", 2560, ())
    assert plan(NETWORK, bond=64, allow_growth=True)["fc2"].record().num_stored == grown


def test_dense_unless_strictly_smaller() -> None:
    layer = plan(NETWORK, bond=4)["fc1"]
    assert leave_dense_unless_smaller(layer, 256 * 784 - 1) is layer
    assert leave_dense_unless_smaller(layer, 256 * 784).is_dense


def test_tolerance_starts_from_the_full_bond() -> None:
    layer = plan(NETWORK, max_error=0.1)["fc1"]
    assert (layer.truncation.tolerance, layer.truncation.max_bond) == (0.1, layer.structure.full_bond)


def test_discard_starts_from_the_full_bond_or_its_cap() -> None:
    layer = plan(NETWORK, discard=0.1)["fc1"]
    assert (layer.truncation.discard, layer.truncation.max_bond) == (0.1, layer.structure.full_bond)
    capped = plan(NETWORK, (LayerRule("fc1", bond=5, discard=0.2),), discard=0.1, bond=3)
    assert (capped["fc1"].truncation.discard, capped["fc1"].truncation.max_bond) == (0.2, 5)
    assert (capped["conv2"].truncation.discard, capped["conv2"].truncation.max_bond) == (0.1, 3)
    assert plan(NETWORK, (LayerRule("fc1", bond=5),), discard=0.1)["fc1"].truncation.discard == 0.0
    assert (
        plan(NETWORK, (LayerRule("fc1", discard=0.2),), bond=3)["fc1"].truncation.max_bond
        == layer.truncation.max_bond
    )


def test_mera_rejects_tolerances() -> None:
    assert plan(NETWORK, (LayerRule("fc1", form="tree"),), discard=0.1)["fc1"].truncation.discard == 0.1
    for option in ("discard", "max_error"):
        goal = {option: 0.1}
        with pytest.raises(UsageError, match=f"fc1: --{option.replace('_', '-')} truncates bonds"):
            plan(NETWORK, (LayerRule("fc1", form="mera"),), **goal)


def test_layer_rules_win() -> None:
    rules = (
        LayerRule("fc*", bond=7, sites=2),
        LayerRule("fc2", max_error=0.2),
        LayerRule("conv1", dense=True),
    )
    layers = plan(NETWORK, rules, bond=3, sites=3)
    assert layers["conv1"].is_dense and layers["conv1"].record().reason == "the recipe leaves it dense"
    assert layers["conv2"].truncation.max_bond == 3 and len(layers["conv2"].structure.output_factors) == 4
    assert layers["fc1"].truncation.max_bond == 7 and len(layers["fc1"].structure.output_factors) == 2
    assert layers["fc2"].truncation.tolerance == 0.2 and len(layers["fc2"].structure.output_factors) == 2


def test_shapes_apply_to_fitting_or_named_layers() -> None:
    everywhere = parse_shape("4x7x7x4:4x4x4x4")
    named = parse_shape("fc2=4x4x4x4:1x1x10x1")
    layers = plan(NETWORK, bond=4, shape=(everywhere, named))
    assert layers["fc1"].structure.input_factors == (4, 7, 7, 4)
    assert layers["fc2"].structure.output_factors == (1, 1, 10, 1)
    assert layers["fc2"].record().num_stored == 736


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": (parse_shape("4x4:4x4"),)}, "--shape 4x4:4x4: fits no selected layer's"),
        ({"shape": (parse_shape("fc1=4x4:4x4"),)}, "shape for layer fc1: 4×4 = 16 inputs"),
        ({"shape": (parse_shape("fc9=4x4:4x4"),)}, "--shape pattern 'fc9' matches no tensor; .* 'fc"),
        ({"rules": (LayerRule("fd1"),)}, r"\[layer\] pattern 'fd1' matches no tensor; .* 'fc1'"),
    ],
)
def test_rejects_shapes_that_fit_no_layer(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(selection(*NETWORK), Recipe(bond=4, **options))


def test_rejects_an_empty_selection() -> None:
    """The options are wrong only where they left layers out."""
    for recipe, status in ((Recipe(bond=4, exclude=("*",)), 2), (Recipe(bond=4), 1)):
        with pytest.raises(MpocError, match="no layer is left to compress") as caught:
            make_plan(selection(), recipe)
        assert caught.value.exit_code == status


@SOME
@given(MAPS, st.floats(0.001, 1))
def test_ratio_is_a_ceiling_and_is_used(maps: list[LinearMap], ratio: float) -> None:
    try:
        plans = make_plan(selection(*maps), Recipe(ratio=ratio))
    except UsageError:
        assert ratio_of(make_plan(selection(*maps), Recipe(bond=1))) > ratio
        return
    assert ratio_of(plans) <= ratio
    total = sum(layer.structure.num_original for layer in plans)
    for layer in plans:
        if layer.is_dense:
            shrinks = layer.structure.num_parameters(1) < layer.structure.num_original
            assert layer.record().reason == (
                "fits the budget uncompressed" if shrinks else "would not shrink even at bond 1"
            )
            assert not shrinks or ratio == 1.0
            continue
        now, more = (layer.structure.num_parameters(layer.truncation.max_bond + k) for k in (0, 1))
        fits = ratio_of(plans) + (more - now) / total <= ratio * (1 - 1e-12)
        assert more == now or more >= layer.structure.num_original or not fits


def test_unreachable_ratio_names_a_reachable_one() -> None:
    with pytest.raises(UsageError, match=r"--ratio 0\.0001 cannot be reached") as caught:
        make_plan(selection(*NETWORK), Recipe(ratio=0.0001))
    assert caught.value.hint is not None
    within = float(caught.value.hint.split()[1].rstrip(","))
    assert ratio_of(make_plan(selection(*NETWORK), Recipe(ratio=within))) <= within < 0.1


@pytest.mark.parametrize("growth", [False, True])
def test_ceiling_counts_layers_with_their_own_goal(growth: bool) -> None:
    rules = (LayerRule("conv2", bond=4), LayerRule("fc2", dense=True))
    layers = plan(NETWORK, rules, ratio=0.5, allow_growth=growth)
    assert layers["conv2"].truncation.max_bond == 4 and layers["fc2"].is_dense
    assert 0.49 < ratio_of(list(layers.values())) <= 0.5


def test_ceiling_counts_growing_layers_as_dense() -> None:
    maps = [LinearMap(f"{name}.weight", "linear", (64, 64), "float32", False) for name in "ab"]
    for rule in (LayerRule("a", bond=10**6), LayerRule("a", max_error=0.1), LayerRule("a", discard=0.1)):
        layers = plan(maps, (rule,), ratio=0.8)
        spent = 64 * 64 + layers["b"].record().num_stored
        assert 0.75 < spent / (2 * 64 * 64) <= 0.8


@SOME
@given(MAPS, st.floats(0.1, 1.1), st.sampled_from([None, "bfloat16"]))
def test_size_is_a_ceiling_and_is_used(maps: list[LinearMap], share: float, dtype: str | None) -> None:
    def make(goal: Recipe, predict: Callable[[list[LayerPlan]], int] | None = None) -> list[LayerPlan]:
        return make_plan(selection(*maps), goal, predict)

    size = int(share * 4 * sum(make_structure(m.kind, m.shape).num_original for m in maps)) + 1000
    smallest = size_with_text(make(Recipe(bond=1, dtype=dtype)))
    try:
        plans = make(Recipe(size=size, dtype=dtype), size_with_text)
    except UsageError as error:
        # Longer texts may cost what bond 1 had left.
        assert smallest > size - 10 and f"has {smallest} bytes" in str(error)
        return
    assert size_with_text(plans) <= size
    steps = [
        (layer.structure.num_parameters(layer.truncation.max_bond + 1) - layer.record().num_stored)
        * ITEMSIZE[layer.stored_dtype]
        for layer in plans
        if not layer.is_dense
        and layer.structure.num_parameters(layer.truncation.max_bond + 1) < layer.structure.num_original
    ]
    unspent = size - size_with_text(plans)
    assert all(step == 0 or step > unspent - 50 * len(plans) for step in steps)


def test_recipe_file_may_leave_bonds_open(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('ratio = 0.2\n[layer."fc1"]\nbond = 5\nshape = "28x28:16x16"\n')
    recipe = make_recipe(file, {})
    layers = {layer.map.layer: layer for layer in make_plan(selection(*NETWORK), recipe)}
    assert layers["fc1"].structure.input_factors == (28, 28) and layers["fc1"].truncation.max_bond == 5
    assert recipe.rules[0].shape == ShapeRule(None, (16, 16), (28, 28))


def test_plan_is_deterministic() -> None:
    first, second = (make_plan(selection(*NETWORK), Recipe(ratio=0.3)) for _ in range(2))
    assert first == second


def planned_sum(tmp_path: Path, **options: Any) -> LayerPlan:
    torch.save({"c.weight": torch.randn(8, 8, 3, 3)}, tmp_path / "m.pt")
    recipe = make_recipe(None, {"ratio": 0.9, "form": "svd+mpo"} | options)
    (plan,) = make_plan(select(open_checkpoint(tmp_path / "m.pt")), recipe)
    return plan


def test_plan_of_a_sum_counts_both_parts(tmp_path: Path) -> None:
    chain = planned_sum(tmp_path)
    assert (chain.record().form, chain.structure.form) == ("mpo", "mpo")
    structure, goal = chain.structure.as_form("svd+mpo"), replace(chain.truncation, rank=5)
    record = replace(chain, structure=structure, goal=goal).record()
    assert (record.form, record.low_rank) == ("svd+mpo", 5)
    assert record.num_stored == chain.record().num_stored + 5 * (8 + 72)
    assert record.num_stored == sum(math.prod(shape) for shape in record.core_shapes)


def test_sum_rejects_whole_maps(tmp_path: Path) -> None:
    sizes = (parse_input_shape("6x6"),)
    with pytest.raises(UsageError, match=r"--form svd\+mpo"):
        planned_sum(tmp_path, conv="map", input_shape=sizes)
