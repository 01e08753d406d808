"""Whole maps from end to end: plan and ρ, files, loading, expanding, in memory."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mpoc
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.plan import make_plan
from mpoc.compression.recipe import Recipe, make_recipe
from mpoc.compression.recipe_syntax import parse_input_shape, parse_shape
from mpoc.compression.selection import LinearMap, Selection
from mpoc.errors import MpocError, UsageError
from mpoc.io.hub_directory import configured_layer, quantization_config
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.nn import MPOConvMap2d, MPOLinear
from mpoc.tensor_networks.geometry import make_geometry
from mpoc.tensor_networks.structure import make_structure
from tests.support.checkpoints import relative_error, save_directory

SOME = settings(max_examples=60, deadline=None, derandomize=True)
VGG = [
    ("conv5_1", "conv2d", (512, 512, 3, 3), "2x8x8x8x2:2x8x8x8x2"),
    ("conv5_2", "conv2d", (512, 512, 3, 3), "2x8x8x8x2:2x8x8x8x2"),
    ("fc1", "linear", (4096, 512), "4x4x4x4x2:4x4x8x8x4"),
    ("fc2", "linear", (4096, 4096), "4x4x8x8x4:4x4x8x8x4"),
    ("fc3", "linear", (10, 4096), "4x4x8x8x4:1x10x1x1x1"),
]
MAPS: dict[str, Any] = {
    "conv": "map",
    "input_shape": tuple(
        parse_input_shape(text) for text in ("first=8x8:stride=2", "second=4x4:padding_mode=circular")
    ),
}


def network() -> Any:
    """(3, 8, 8) → (8, 4, 4) → (8, 4, 4) → 10; an ``nn.Sequential``."""
    layers = OrderedDict(
        first=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        act=nn.ReLU(),
        second=nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False),
        flat=nn.Flatten(),
        head=nn.Linear(128, 10),
    )
    return nn.Sequential(layers)


def selection(*maps: LinearMap) -> Selection:
    return Selection(list(maps), {}, "names and shapes")


def compressed(folder: Path, model: nn.Module, **options: Any) -> Path:
    torch.save(model.state_dict(), folder / "m.pt")
    recipe = make_recipe(None, {"bond": 10**6, "allow_growth": True, **MAPS, **options})
    compress_checkpoint(folder / "m.pt", folder / "m.safetensors", recipe, force=True)
    return folder / "m.safetensors"


def test_vgg16_counts_match_the_paper() -> None:
    maps = [LinearMap(f"{name}.weight", kind, shape, "float32", False) for name, kind, shape, _ in VGG]
    shapes = tuple(parse_shape(f"{name}={shape}") for name, _, _, shape in VGG)
    recipe = Recipe(bond=4, shape=shapes, conv="map", input_shape=(parse_input_shape("conv5_*=2x2"),))
    records = [plan.record() for plan in make_plan(selection(*maps), recipe)]
    assert [record.kind for record in records] == ["convmap", "convmap", "linear", "linear", "linear"]
    # Σ D J I D by hand: 2·2·4 + 3 · 4·8·8·4 + 4·2·2, and so on.
    assert [record.num_stored for record in records] == [
        16 + 3 * 1024 + 16,
        16 + 3 * 1024 + 16,
        64 + 256 + 512 + 512 + 32,
        64 + 256 + 1024 + 1024 + 64,
        16 + 640 + 128 + 128 + 16,
    ]
    original = [record.num_original for record in records]
    assert original == [512 * 512 * 9, 512 * 512 * 9, 512 * 4096, 4096 * 4096, 4096 * 10]
    total = sum(record.num_stored for record in records)
    assert (total, sum(original)) == (10_944, 23_633_920)
    assert total / sum(original) == pytest.approx(0.00046, abs=5e-6)


_SIZE = st.integers(1, 40)


@SOME
@given(_SIZE, _SIZE, st.integers(1, 2), st.integers(1, 96), st.integers(1, 96), st.integers(2, 6) | st.none())
def test_chosen_factors_keep_height_width_and_channels_apart(
    height: int, width: int, stride: int, outputs: int, inputs: int, sites: int | None
) -> None:
    shape = (outputs, inputs, 3, 3)
    geometry = make_geometry(shape, (height, width), (stride,))
    structure = make_structure("convmap", shape, sites=sites, geometry=geometry)
    assert structure.padding == (0, 0) and structure.axis_factors is not None
    assert (structure.outputs, structure.inputs) == (
        math.prod(geometry.output_size) * outputs,
        height * width * inputs,
    )
    if sites is None:
        axes = [sum(pair != (1, 1) for pair in site) for site in structure.axis_factors]
        assert max(axes) <= 1
    else:
        assert len(structure.output_factors) <= sites


@pytest.mark.parametrize(
    ("channels", "size", "outputs", "inputs"),
    [
        (512, (2, 2), (2, 2, 8, 8, 8), (2, 2, 8, 8, 8)),
        (256, (8, 8), (8, 8, 8, 8, 4), (8, 8, 4, 8, 8)),
        (64, (32, 32), (4, 8, 4, 8, 4, 4, 4), (4, 8, 4, 8, 4, 4, 4)),
    ],
)
def test_chosen_factors_of_common_maps(
    channels: int, size: tuple[int, int], outputs: tuple[int, ...], inputs: tuple[int, ...]
) -> None:
    shape = (channels, channels, 3, 3)
    structure = make_structure("convmap", shape, geometry=make_geometry(shape, size))
    assert (structure.output_factors, structure.input_factors) == (outputs, inputs)


def test_full_bond_is_that_of_the_map() -> None:
    geometry = make_geometry((1, 1, 3), (64,))
    structure = make_structure("convmap", (1, 1, 3), factors=((8, 8), (8, 8)), geometry=geometry)
    assert structure.full_bond == 64 > 2 * structure.num_original


def test_conv_option_selects_maps() -> None:
    maps = [LinearMap(f"c{k}.weight", "conv2d", (16, 16, 3, 3), "float32", False) for k in range(3)]
    rules = make_recipe(None, {"bond": 2, "conv": "map", "input_shape": (parse_input_shape("4x4"),)})
    kinds = [plan.structure.kind for plan in make_plan(selection(*maps), rules)]
    assert kinds == ["convmap"] * 3
    kinds = [plan.structure.kind for plan in make_plan(selection(*maps), Recipe(bond=2))]
    assert kinds == ["conv2d"] * 3


def test_recipe_file_selects_single_maps(tmp_path: Path) -> None:
    text = 'bond = 2\ninput-shape = ["4x4:stride=2"]\n[layer.c1]\nconv = "map"\n'
    text += '[layer.c2]\nconv = "map"\ninput-shape = "2x2"\n'
    (tmp_path / "r.toml").write_text(text)
    recipe = make_recipe(tmp_path / "r.toml", {})
    maps = [LinearMap(f"c{k}.weight", "conv2d", (16, 16, 3, 3), "float32", False) for k in range(3)]
    first, second, third = (plan.structure for plan in make_plan(selection(*maps), recipe))
    assert first.kind == "conv2d" and first.geometry is None
    assert second.geometry is not None and third.geometry is not None
    assert (second.geometry.size, second.geometry.stride) == ((4, 4), (2, 2))
    assert (third.geometry.size, third.geometry.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conv": "mup"}, "--conv 'mup': not one of kernel, map; did you mean 'map'"),
        ({"input_shape": ("c=2x2",)}, "--input-shape requires --conv map"),
        ({"conv": "map"}, "layer c: as one map .* needs its input size"),
        ({"conv": "map", "input_shape": ("d=2x2",)}, "--input-shape pattern 'd' matches no tensor"),
        ({"conv": "map", "input_shape": ("c=2x2x2",)}, "layer c: input size 2x2x2 for a kernel of size 3x3"),
        ({"conv": "map", "input_shape": ("c=2x2",), "shape": ("c=4x8:8x8",)}, "layer c: 4×8 = 32 inputs and"),
        (
            {"conv": "map", "input_shape": ("c=512x512",), "shape": ("c=30x131072:30x131072",)},
            "layer c: a map of 3932160 × 3932160 numbers is built from shifts",
        ),
    ],
)
def test_rejects_bad_shapes(options: dict[str, Any], said: str) -> None:
    parsers = {"input_shape": parse_input_shape, "shape": parse_shape}
    for key, parse in parsers.items():
        if key in options:
            options = options | {key: tuple(map(parse, options[key]))}
    conv = LinearMap("c.weight", "conv2d", (15, 15, 3, 3), "float32", False)
    with pytest.raises(UsageError, match=said):
        make_plan(selection(conv), make_recipe(None, {"bond": 2} | options))


def test_full_bond_preserves_the_network(tmp_path: Path) -> None:
    model = network()
    path = compressed(tmp_path, model)
    manifest = read_manifest(path)
    assert [layer.kind for layer in manifest.layers] == ["convmap", "convmap", "linear"]
    assert all(layer.relative_error is not None and layer.relative_error < 1e-5 for layer in manifest.layers)
    x = torch.randn(5, 3, 8, 8)
    expected = model(x)
    loaded: Any = mpoc.load(path, network())
    assert type(loaded.second) is MPOConvMap2d and loaded.second.in_channels == 8
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    state = loaded.state_dict()
    stored = load_file(path)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_in_memory_matches_the_file(tmp_path: Path) -> None:
    model = network()
    path = compressed(tmp_path, model, bond=4, allow_growth=False)
    report = mpoc.compress(model, bond=4, conv="map", input_shape=(1, 3, 8, 8))
    assert report.layers == read_manifest(path).layers
    assert {layer.form for layer in report.layers} == {"mpo", "dense"}
    loaded = mpoc.load(path, network())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(x), loaded(x))
    with pytest.raises(ValueError, match="knows no other size"):
        model[2](torch.zeros(1, 8, 8, 8))


def test_checks_options_in_memory() -> None:
    model = network()
    names = list(model.state_dict())
    with pytest.raises(UsageError, match='input_shape requires conv="map"'):
        mpoc.compress(model, bond=4, input_shape=(1, 3, 8, 8))
    with pytest.raises(UsageError, match="needs the shape of one input"):
        mpoc.compress(model, bond=4, conv="map")
    assert list(model.state_dict()) == names


def test_map_that_would_not_shrink_stays_dense(tmp_path: Path) -> None:
    path = compressed(tmp_path, network(), bond=16, allow_growth=False)
    first = read_manifest(path).layers[0]
    assert (first.form, first.kind, first.geometry) == ("dense", "conv2d", None)
    assert "would not shrink at bond 16: 216 → " in first.reason
    loaded: Any = mpoc.load(path, network())
    assert type(loaded[0]) is nn.Conv2d


def test_map_may_shrink_below_its_cap(tmp_path: Path) -> None:
    """Shifts need few bonds: the plan's count at the cap is an upper bound."""
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    shape = (parse_input_shape("0=8x8"),)
    options = {"bond": 16, "allow_growth": False, "input_shape": shape}
    layer = read_manifest(compressed(tmp_path, conv, **options)).layers[0]
    bound = layer.structure.num_parameters(16)
    assert layer.num_stored < layer.num_original < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expand_restores_kernels_at_full_bond(tmp_path: Path, dtype: str) -> None:
    model = network()
    path = compressed(tmp_path, model, dtype=dtype)
    expand_checkpoint(path, tmp_path / "dense.safetensors")
    dense, state = load_file(tmp_path / "dense.safetensors"), model.state_dict()
    assert dense.keys() == state.keys()
    for name in ("first.weight", "second.weight"):
        assert dense[name].shape == state[name].shape
        assert relative_error(state[name], dense[name]) < (1e-5 if dtype == "float32" else 0.02)
    assert torch.equal(dense["first.bias"], state["first.bias"])


def noisy(path: Path) -> Path:
    """The file with cores changed, as training changes them: no convolution any more."""
    stored = load_file(path)
    for name in stored:
        if ".cores." in name:
            stored[name] += 0.1 * torch.randn_like(stored[name])
    manifest = read_manifest(path)
    save_file(stored, path, {"format": "pt", "mpoc": manifest.to_json()})
    return path


def test_expand_rejects_truncated_maps(tmp_path: Path) -> None:
    path = noisy(compressed(tmp_path, network()))
    with pytest.raises(MpocError, match="layer first: its map is no longer a convolution") as caught:
        expand_checkpoint(path, tmp_path / "dense.safetensors")
    assert "--project" in (caught.value.hint or "")
    assert not (tmp_path / "dense.safetensors").exists()


def test_expand_projects_and_reports_the_error(tmp_path: Path) -> None:
    model = network()
    path = noisy(compressed(tmp_path, model))
    said: dict[str, float] = {}

    def note(layer: LayerRecord, error: float) -> None:
        said[layer.layer] = error

    expand_checkpoint(path, tmp_path / "dense.safetensors", projected=note)
    assert said.keys() == {"first", "second"}
    dense = load_file(tmp_path / "dense.safetensors")
    loaded: Any = mpoc.load(path, network())
    basis = torch.eye(3 * 8 * 8).reshape(-1, 3, 8, 8)
    own = loaded[0](basis) - loaded[0].bias[:, None, None]
    nearest = nn.functional.conv2d(basis, dense["first.weight"], stride=2, padding=1)
    assert said["first"] == pytest.approx(relative_error(own.detach(), nearest), rel=1e-4)
    assert said["first"] > 0.01


def test_loading_compares_the_geometry(tmp_path: Path) -> None:
    path = compressed(tmp_path, network())
    other = network()
    other[2].padding_mode = "zeros"
    with pytest.raises(MpocError, match=r"layer second: .*padding_mode='circular'.*padding_mode='zeros'"):
        mpoc.load(path, other)
    assert type(other[0]) is nn.Conv2d


def test_manifest_checks_the_geometry(tmp_path: Path) -> None:
    path = compressed(tmp_path, network())
    manifest = read_manifest(path)
    geometry = manifest.layers[0].geometry
    assert geometry is not None
    assert (geometry.size, geometry.output_size, geometry.stride) == ((8, 8), (4, 4), (2, 2))
    for key, value in (("stride", [0, 1]), ("size", [8]), ("groups", "1"), ("kernel_size", [3, 4])):
        damaged = json.loads(manifest.to_json())
        damaged["layers"][0]["geometry"][key] = value
        save_file({"x": torch.zeros(1)}, tmp_path / "d.safetensors", {"mpoc": json.dumps(damaged)})
        with pytest.raises(MpocError, match="damaged manifest"):
            read_manifest(tmp_path / "d.safetensors")
    for change in ({"geometry": None}, {"kind": "conv2d"}):
        damaged = json.loads(manifest.to_json())
        damaged["layers"][0] |= change
        save_file({"x": torch.zeros(1)}, tmp_path / "d.safetensors", {"mpoc": json.dumps(damaged)})
        with pytest.raises(MpocError, match="damaged manifest"):
            read_manifest(tmp_path / "d.safetensors")


def test_config_round_trips_the_geometry(tmp_path: Path) -> None:
    source = save_directory(tmp_path / "net", network().state_dict())
    recipe = make_recipe(None, {"bond": 4, "allow_growth": True, **MAPS})
    compress_checkpoint(source, tmp_path / "net-mpo", recipe)
    manifest: Manifest = read_manifest(tmp_path / "net-mpo")
    config = json.loads((tmp_path / "net-mpo" / "config.json").read_text())["quantization_config"]
    assert config == json.loads(json.dumps(quantization_config(manifest)))
    for layer in manifest.replaced:
        found = configured_layer(layer.name, config["layers"][layer.name])
        assert (found.structure, found.core_shapes) == (layer.structure, layer.core_shapes)
    assert "geometry" not in config["layers"]["head.weight"]
    entry = config["layers"]["first.weight"]
    for damaged in ({**entry, "geometry": {}}, {**entry, "kind": "conv2d"}, {**entry, "geometry": None}):
        with pytest.raises(MpocError, match=r"damaged quantization_config of 'first\.weight'"):
            configured_layer("first.weight", damaged)
    loaded: Any = mpoc.load(tmp_path / "net-mpo", network())
    assert type(loaded[0]) is MPOConvMap2d and type(loaded[4]) is MPOLinear
