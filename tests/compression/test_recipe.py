"""Options and recipe files: what is read, what wins, what is refused."""

import re
from dataclasses import fields
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.recipe import LayerRule, Recipe, make_recipe
from mpoc.compression.recipe_syntax import InputShape, ShapeRule, parse_shape
from mpoc.errors import UsageError
from mpoc.runtime.formatting import parse_size
from mpoc.tensor_networks.factors import OrderRule

SOME = settings(max_examples=100, deadline=None, derandomize=True)

# Every option as a file may give it, and what it means.
EVERY_KEY: list[tuple[str, str, Any]] = [
    ("bond", "8", 8),
    ("ratio", "1", 1.0),
    ("max-error", "0.25", 0.25),
    ("discard", "0.01", 0.01),
    ("size", '"20MB"', 20_000_000),
    ("max-drop", "1", 1.0),
    ("bits", "4", 4),
    ("storage", "'float'", "float"),
    ("form", "'svd'", "svd"),
    ("effort", "'fast'", "fast"),
    ("sites", "3", 3),
    ("shape", '"28x28:16x16"', (ShapeRule(None, (16, 16), (28, 28)),)),
    ("shape", '["fc=4x4:2x8"]', (ShapeRule("fc", (2, 8), (4, 4)),)),
    ("order", '"morton:28x28"', (OrderRule(None, "morton:28x28"),)),
    ("order", '["fc=learned", "raster"]', (OrderRule("fc", "learned"), OrderRule(None, ""))),
    ("conv", '"map"', "map"),
    ("input-shape", '"8x4:stride=2"', (InputShape(None, (8, 4), (2,)),)),
    ("input-shape", '["c=3"]', (InputShape("c", (3,)),)),
    ("layers", '"fc*"', ("fc*",)),
    ("exclude", '["a", "re:b"]', ("a", "re:b")),
    ("embeddings", "true", True),
    ("min-params", "100", 100),
    ("allow-growth", "true", True),
    ("dtype", '"bfloat16"', "bfloat16"),
    ("seed", "7", 7),
    ("device", '"cpu"', "cpu"),
    ("max-shard-size", "5000", 5000),
    ("max-shard-size", '"1KiB"', 1024),
]
GOALS: dict[str, Any] = {
    "bond": 8,
    "ratio": 0.5,
    "max_error": 0.1,
    "size": 1000,
    "max_drop": 0.5,
    "discard": 0.01,
}
SEVERAL = [pair for pair in combinations(GOALS, 2) if pair != ("bond", "discard")]


def read(tmp_path: Path, text: str, **options: Any) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text, "utf-8")
    return make_recipe(file, options)


@pytest.mark.parametrize(("key", "text", "value"), EVERY_KEY)
def test_file_accepts_every_option(tmp_path: Path, key: str, text: str, value: Any) -> None:
    field = key.replace("-", "_")
    goal: dict[str, Any] = {} if field in GOALS else {"bond": 8}
    if field == "input_shape":
        goal["conv"] = "map"
    found = getattr(read(tmp_path, f"{key} = {text}", **goal), field)
    assert found == value and type(found) is type(value)


def test_option_list_is_complete() -> None:
    assert {key.replace("-", "_") for key, _, _ in EVERY_KEY} | {"rules"} == {f.name for f in fields(Recipe)}


@pytest.mark.parametrize("goal", GOALS)
def test_one_goal_is_enough(goal: str) -> None:
    assert getattr(make_recipe(None, {goal: GOALS[goal]}), goal) == GOALS[goal]


def test_unset_options_have_defaults() -> None:
    recipe = make_recipe(None, {"bond": 1})
    assert recipe == Recipe(bond=1, ratio=None, max_error=None, size=None, sites=None)
    assert (recipe.shape, recipe.layers, recipe.exclude, recipe.rules) == ((), (), (), ())
    assert (recipe.embeddings, recipe.allow_growth, recipe.dtype) == (None, False, None)
    assert (recipe.min_params, recipe.seed, recipe.device, recipe.max_shard_size) == (0, 0, "auto", 5 * 10**9)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"bond": 1, "sites": 2},
        *({"bond": 1, "dtype": dtype} for dtype in ("float64", "float32", "bfloat16", "float16")),
    ],
)
def test_accepts_boundary_values(options: dict[str, Any]) -> None:
    recipe = make_recipe(None, options)
    assert {key: getattr(recipe, key) for key in options} == options


@pytest.mark.parametrize("goals", [(), *SEVERAL, ("bond", "discard", "ratio"), tuple(GOALS)], ids=str)
def test_rejects_no_goal_and_several(goals: tuple[str, ...]) -> None:
    said = "exactly one of --bond, --discard, --ratio, --max-error, --size and --max-drop"
    with pytest.raises(UsageError, match=said) as caught:
        make_recipe(None, {goal: GOALS[goal] for goal in goals} | {"seed": 1})
    assert all("--" + goal.replace("_", "-") in str(caught.value).partition("given:")[2] for goal in goals)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 7}, "--bits 7: must be one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 0}, "--bits 0: must be one of"),
        ({"bits": 4, "storage": "float"}, "--storage float is not rounded to bits, got bits 4"),
        ({"bond": 4, "storage": "coded"}, "--storage coded requires bits"),
        ({"size": 9_000, "form": "svd", "storage": "coded"}, "--storage coded requires bits"),
        (
            {"bits": 4, "storage": "gird"},
            "--storage 'gird': not one of grid, coded, float; did you mean",
        ),
        ({"storage": "float"}, "exactly one of"),
        ({"bits": 4, "sites": 3}, "--sites: --bits alone leave layers dense"),
        ({"size": 0.25, "storage": "coded", "conv": "map"}, "--storage coded requires bits"),
        ({"size": 0.25, "storage": "coded", "sites": 3}, "--storage coded requires bits"),
        ({"bits": 4, "form": "svd"}, "--form: --bits alone leave layers dense"),
    ],
)
def test_rejects_storage_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        make_recipe(None, options)


def test_bits_alone_are_a_goal_and_go_with_any_other() -> None:
    assert make_recipe(None, {"bits": 4}).storage_for("a.weight") == ("grid", 4)
    for goal, value in GOALS.items():
        assert make_recipe(None, {goal: value, "bits": 3, "storage": "coded"}).bits == 3


@pytest.mark.parametrize(
    ("table", "storage"),
    [
        ("bits = 8", ("grid", 8)),
        ('storage = "coded"', ("coded", 4)),
        ('storage = "float"', ("float", None)),
        ("dense = true", ("grid", 4)),
    ],
)
def test_rules_set_the_storage_of_layers(tmp_path: Path, table: str, storage: tuple[str, int | None]) -> None:
    recipe = read(tmp_path, f"bits = 4\n[layer.a]\n{table}\n")
    assert (recipe.storage_for("a.weight"), recipe.storage_for("b.weight")) == (storage, ("grid", 4))
    with pytest.raises(UsageError, match="layer 'a': storage grid requires bits"):
        read(tmp_path, 'bond = 4\n[layer.a]\nstorage = "grid"\n')


def test_bond_may_cap_discard() -> None:
    recipe = make_recipe(None, {"bond": 8, "discard": 0.01})
    assert (recipe.bond, recipe.discard) == (8, 0.01)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    text = 'bond = 8\nseed = 3\nlayers = ["a"]\n'
    recipe = read(tmp_path, text, seed=4, layers=None)
    assert (recipe.bond, recipe.seed, recipe.layers) == (8, 4, ("a",))


def test_goal_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    recipe = read(tmp_path, "bond = 8", ratio=0.5)
    assert (recipe.bond, recipe.ratio) == (None, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bnd = 8", "unknown key 'bnd'; did you mean 'bond'?"),
        ("max_error = 0.1", "unknown key 'max_error'; did you mean 'max-error'?"),
        ("rules = 1", "unknown key 'rules'"),
        ("[layer.fc]\nbonds = 8", r"\[layer.'fc'\]: unknown key 'bonds'; did you mean 'bond'?"),
        ("[layer.fc]\npattern = 'a'", "unknown key 'pattern'"),
        ("[layer.fc]\nembeddings = true", "unknown key 'embeddings'"),
        ("[layers.fc]\nbond = 8", "a table in a table"),
        ("[layer.fc.conv1]\nbond = 8", "a table in a table"),
        ("layer = 3", r"layers are tables, as in \[layer\.\"encoder\.\*\"\]"),
        ("[layer]\nfc = 3", "layers are tables"),
        ("bond = 8.0", "bond = 8.0: must be an integer"),
        ("bond = true", "bond = True: must be an integer"),
        ('bond = "8"', "bond = '8': must be an integer"),
        ('ratio = "half"', "ratio: 'half' is not a number"),
        ("ratio = true", "ratio = True: must be a number"),
        ("embeddings = 1", "embeddings = 1: must be true or false"),
        ("dtype = 16", "dtype = 16: must be a string"),
        ("layers = [1]", r"layers = \[1\]: must be a string or a list of strings"),
        ('size = "20 apples"', "size: '20 apples' is not a size"),
        ('shape = "4x4"', "shape: '4x4' is not a shape"),
        ("[layer.fc]\nshape = []", "shape = .*: must be one IN:OUT without a pattern"),
        (
            '[layer.fc]\nshape = ["4:4", "2:2"]',
            "shape = .*: must be one IN:OUT without a pattern",
        ),
        ('[layer.fc]\nshape = "other=4:4"', "shape = .*: must be one IN:OUT without a pattern"),
        ("bond = ", "not valid TOML"),
        ("bond = 1\nbond = 2", "not valid TOML"),
    ],
)
def test_names_mistakes_in_a_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, text)
    assert "recipe.toml" in str(caught.value)


def test_rejects_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe file"):
        make_recipe(tmp_path / "absent.toml", {"bond": 8})
    (tmp_path / "latin.toml").write_bytes(b'device = "\xff"')
    with pytest.raises(UsageError, match="not valid TOML"):
        make_recipe(tmp_path / "latin.toml", {"bond": 8})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bond": 0}, "--bond 0: the bond dimension must be positive"),
        ({"ratio": 0.0}, "--ratio 0.0: .* above 0 and at most 1"),
        ({"ratio": 1.01}, "--ratio 1.01"),
        ({"ratio": float("nan")}, "--ratio nan"),
        ({"max_error": 0.0}, "--max-error 0.0: must lie between 0 and 1"),
        ({"max_error": 1.0}, "--max-error 1.0"),
        ({"max_error": float("nan")}, "--max-error nan"),
        ({"discard": 0.0}, "--discard 0.0: must lie between 0 and 1"),
        ({"discard": 1.0}, "--discard 1.0"),
        ({"size": 0}, "--size 0: must be above 0"),
        ({"max_drop": -0.1}, "--max-drop -0.1: .* at least 0"),
        ({"max_drop": float("nan")}, "--max-drop nan"),
        ({"max_drop": float("inf")}, "--max-drop inf"),
        ({"bond": 8, "sites": 1}, "--sites 1: .* at least 2 sites"),
        ({"bond": 8, "min_params": -1}, "--min-params -1: must not be negative"),
        ({"bond": 8, "max_shard_size": 0}, "--max-shard-size 0"),
        ({"bond": 8, "dtype": "bfloat61"}, "--dtype 'bfloat61': .*; did you mean 'bfloat16'?"),
    ],
)
def test_rejects_values_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_recipe(None, options)


@pytest.mark.parametrize(
    "text", ["bond = 0", "max-error = 1.0", "discard = 1.0", "sites = 1", "max-error = 0.1\ndiscard = 0.1"]
)
def test_checks_values_of_layer_rules(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"layer 'fc\*': " + text.split()[0]):
        read(tmp_path, f'bond = 4\n[layer."fc*"]\n{text}\n')


def test_later_rules_win(tmp_path: Path) -> None:
    text = """
        ratio = 0.5
        [layer."enc.*"]
        bond = 8
        sites = 3
        [layer."re:query$"]
        bond = 16
        [layer."enc.1.query"]
        max-error = 0.1
        shape = "4x4:2x8"
        [layer.head]
        dense = true
        [layer."hea?"]
        bond = 2
    """
    recipe = read(tmp_path, text)
    assert [rule.pattern for rule in recipe.rules] == ["enc.*", "re:query$", "enc.1.query", "head", "hea?"]
    assert recipe.rule_for("enc.0.key.weight") == LayerRule("enc.0.key.weight", bond=8, sites=3)
    assert recipe.rule_for("enc.0.query.weight") == LayerRule("enc.0.query.weight", bond=16, sites=3)
    last = recipe.rule_for("enc.1.query.weight")  # its own goal takes the place of the earlier one
    assert (last.bond, last.max_error, last.sites) == (None, 0.1, None)  # and its own shape that of sites
    assert last.shape == ShapeRule(None, (2, 8), (4, 4))
    assert (recipe.rule_for("head.weight").dense, recipe.rule_for("head.weight").bond) == (None, 2)
    assert recipe.rule_for("other.weight") == LayerRule("other.weight")


def test_most_specific_shape_wins() -> None:
    free, other, named = map(parse_shape, ("4x4:4x4", "2x8:2x8", "fc=16x1:1x16"))
    table = LayerRule("fc2", shape=parse_shape("1x16:16x1"))
    recipe = Recipe(bond=2, shape=(named, free, other, parse_shape("9:9")), rules=(table,))
    assert recipe.factors_for("fc2.weight", 16, 16) == ((16, 1), (1, 16))  # its table
    assert recipe.factors_for("fc.weight", 16, 16) == ((1, 16), (16, 1))  # a pattern that names it
    assert recipe.factors_for("x.weight", 16, 16) == ((2, 8), (2, 8))  # the last that fits
    assert recipe.factors_for("x.weight", 16, 15) is None


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20MB", 20_000_000),
        ("500kB", 500_000),
        ("1.5GB", 1_500_000_000),
        ("0.002TB", 2_000_000_000),
        ("1.001kB", 1001),
        ("2 TiB", 2**41),
        ("3gib", 3 * 2**30),
        (" 7 b ", 7),
        ("12", 12),
        (12, 12),
        ("1" * 400, int("1" * 400)),
    ],
)
def test_parses_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@SOME
@given(st.decimals(0, 10**6, places=4), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB"]))
def test_parses_large_sizes_exactly(number: Any, unit: str) -> None:
    power = 1024 if "i" in unit else 1000
    exact = Fraction(str(number)) * power ** "BKMG".index(unit[0].upper())
    assert parse_size(f"{number}{unit}") == int(exact)


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "5 megabytes", "20M", "1.5.2kB", "nan", "1e3", "5ib", -3])
def test_rejects_malformed_size(text: str | int) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_shapes_list_inputs_then_outputs() -> None:
    assert parse_shape("4x7x7x4:4x4x4x4") == ShapeRule(None, (4, 4, 4, 4), (4, 7, 7, 4))
    assert parse_shape("re:a=b$=2x3:5x7") == ShapeRule("re:a=b$", (5, 7), (2, 3))
    assert parse_shape("10:4") == ShapeRule(None, (4,), (10,))


@pytest.mark.parametrize(
    "text", ["", "4x4", "4x4:", ":4x4", "=4:4", "4x4:4x4:4x4", "4x-4:4x4", "4.0:4", "0x4:4x4", "fc1"]
)
def test_rejects_malformed_shape(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a shape|must be positive"):
        parse_shape(text)


def test_effort_is_balanced_unless_given_and_requires_calibration() -> None:
    assert make_recipe(None, {"ratio": 0.5}).with_form(calibrated=True).effort == "balanced"
    fast = make_recipe(None, {"ratio": 0.5, "effort": "fast"})
    assert fast.with_form(calibrated=True).effort == "fast"
    with pytest.raises(UsageError, match="--effort requires --calibrate"):
        fast.with_form(calibrated=False)
    with pytest.raises(UsageError, match="--effort 'quick': not one of fast, balanced, thorough"):
        make_recipe(None, {"ratio": 0.5, "effort": "quick"})


def test_sum_requires_calibration_and_a_budget(tmp_path: Path) -> None:
    recipe = make_recipe(None, {"ratio": 0.5, "form": "svd+mpo"})
    assert recipe.with_form(calibrated=True).form == "svd+mpo"
    with pytest.raises(UsageError, match=r"--form svd\+mpo.*--calibrate"):
        recipe.with_form(calibrated=False)
    with pytest.raises(UsageError, match=r"--form svd\+mpo.*--ratio"):
        make_recipe(None, {"bond": 4, "form": "svd+mpo"}).with_form(calibrated=True)
    (tmp_path / "r.toml").write_text('ratio = 0.5\n[layer."fc*"]\nform = "svd+mpo"\n')
    with pytest.raises(UsageError, match="--calibrate"):
        make_recipe(tmp_path / "r.toml", {}).with_form(calibrated=False)
