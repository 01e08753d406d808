"""Orders of inputs from end to end: exact at full bond, undone on load and in what is expanded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.entanglement import entanglement_of
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.hub_directory import configured_layer, quantization_config
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import parse_manifest
from mpoc.tensor_networks.factors import parse_order

NAMES = ["raster", "morton:3x4x4", "learned"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))


def compress(folder: Path, dry_run: bool = False, **options: Any) -> tuple[Path, Manifest, int]:
    torch.save(network().state_dict(), folder / "m.pt")
    orders = tuple(map(parse_order, options.pop("order")))
    recipe = make_recipe(None, {"order": orders, **options})
    done = compress_checkpoint(folder / "m.pt", folder / "m.safetensors", recipe, force=True, dry_run=dry_run)
    return folder / "m.safetensors", done.manifest, done.nbytes


def test_learned_order_is_recorded_and_better(tmp_path: Path) -> None:
    own = compress(tmp_path, bond=4, order=["raster"])[1].layers[0]
    layer = compress(tmp_path, bond=4, order=["learned"])[1].layers[0]
    assert sorted(layer.order) == list(range(48))
    assert (layer.relative_error or 1) < (own.relative_error or 0)
    assert layer.num_stored == own.num_stored


def test_dry_run_reports_a_learned_order(tmp_path: Path) -> None:
    planned = compress(tmp_path, True, bond=4, order=["learned"])
    assert [layer.order for layer in planned[1].layers] == ["learned", "learned"]
    assert compress(tmp_path, bond=4, order=["learned"])[2] <= planned[2]


def test_last_matching_order_wins(tmp_path: Path) -> None:
    orders = ["morton:3x4x4", "morton:8x8", "2=raster"]
    _, manifest, _ = compress(tmp_path, bond=4, order=orders)
    assert [layer.order for layer in manifest.layers] == ["morton:3x4x4", ""]


def test_recipe_tables_set_orders(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('bond = 4\norder = "morton:3x4x4"\n[layer."0"]\norder = "raster"\n')
    assert make_recipe(tmp_path / "r.toml", {}).order_for("0.weight", "linear", 48) == ""
    assert make_recipe(tmp_path / "r.toml", {}).order_for("1.weight", "linear", 48) == "morton:3x4x4"


@pytest.mark.parametrize("order", NAMES[1:])
def test_config_round_trips_the_structure(tmp_path: Path, order: str) -> None:
    _, manifest, _ = compress(tmp_path, bond=4, order=[f"0={order}"])
    entries = json.loads(json.dumps(quantization_config(manifest)))["layers"]
    for layer in manifest.replaced:
        found = configured_layer(layer.name, entries[layer.name])
        assert (found.structure, found.core_shapes) == (layer.structure, layer.core_shapes)
        assert found.structure.permutation == layer.structure.permutation
    entries["0.weight"]["order"] = [0, 0]
    with pytest.raises(MpocError, match=r"damaged quantization_config of '0.weight'"):
        configured_layer("0.weight", entries["0.weight"])


@pytest.mark.parametrize("order", ["spiral", "learned", "morton:2x2", [0] * 48, list(range(47)), 3])
def test_rejects_damaged_orders(tmp_path: Path, order: Any) -> None:
    _, manifest, _ = compress(tmp_path, bond=4, order=["0=morton:3x4x4"])
    value = json.loads(manifest.to_json())
    value["layers"][0]["order"] = order
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": ["0=morton:28x28"]}, "--order morton:28x28: is not of a linear weight with 48 inputs"),
        ({"order": ["morton:28x28"]}, "--order morton:28x28: no selected linear layer has that number"),
        ({"order": ["fc=raster"]}, "--order pattern 'fc' matches no tensor"),
        ({"order": ["0=morton:3x4x4"], "form": "svd"}, "does not matter to the two factors of 0"),
    ],
)
def test_rejects_bad_orders(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compress(tmp_path, bond=4, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


def test_rejects_calibration(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "m.pt")
    recipe = make_recipe(None, {"bond": 4, "order": (parse_order("learned"),)})
    with pytest.raises(UsageError, match=r"--order .*--calibrate"):
        compress_checkpoint(
            tmp_path / "m.pt", tmp_path / "o.safetensors", recipe, calibrate=CalibrationRequest(tmp_path)
        )


def test_entanglement_follows_the_order(tmp_path: Path) -> None:
    path, manifest, _ = compress(tmp_path, bond=4, order=["0=learned"])
    (profile, _) = entanglement_of(tmp_path / "m.pt", {}, against=path).profiles
    assert profile.structure.order == manifest.layers[0].order
    morton = {"order": (parse_order("morton:3x4x4"),), "layers": ("0",)}
    (ordered,) = entanglement_of(tmp_path / "m.pt", morton).profiles
    assert ordered.structure.order == "morton:3x4x4"
    with pytest.raises(UsageError, match="--order learned: what 0 is truncated to"):
        entanglement_of(tmp_path / "m.pt", {"order": (parse_order("learned"),)})


def test_gradients_match_the_dense_network(tmp_path: Path) -> None:
    path, _, _ = compress(tmp_path, bond=4, order=["morton:3x4x4", "2=raster"])
    model, x = mpoc.load(path, network()), torch.randn(3, 48, requires_grad=True)
    model(x).square().sum().backward()
    dense = network()
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            view: Any = model.get_submodule(name[0]).weight
            dense.get_parameter(name).copy_(torch.clone(view))
    again = x.detach().clone().requires_grad_()
    dense(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
