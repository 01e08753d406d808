"""Orders of inputs from end to end: exact at full bond, undone on load and in what is expanded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpoc
from mpoc.compression.calibrate.statistics import CalibrationRequest
from mpoc.compression.entanglement import entanglement_of
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.hub_directory import cores_of, quantization_config
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import parse_manifest
from mpoc.nn.adopt import adopt
from mpoc.tensor_networks.factors import parse_order
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave, interleave, to_matrix
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.checkpoints import num_bytes

MIXED = tuple(torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist())
ORDERS: list[Any] = ["morton:3x4x4", MIXED]
NAMES = ["raster", "morton:3x4x4", "learned"]


def structure(order: Any, transposed: bool = False, form_name: str = "mpo") -> Structure:
    shape = (48, 64) if transposed else (64, 48)
    plain = make_structure("linear", shape, transposed, sites=3, form=form_name)
    return replace(plain, order=order, input_factors=(4, 4, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=["morton", "permutation"])
class TestLayout:
    def test_columns_follow_the_order(self, order: Any, transposed: bool) -> None:
        place = structure(order, transposed)
        weight = torch.randn(place.shape)
        columns = (weight.T if transposed else weight).T
        assert place.permutation is not None
        for position, column in enumerate(to_matrix(weight, place)[0].T):
            assert torch.equal(column, columns[place.permutation[position]])

    def test_interleave_round_trip(self, order: Any, transposed: bool) -> None:
        place = structure(order, transposed)
        weight = torch.randn(place.shape)
        assert torch.equal(deinterleave(interleave(weight, place), place), weight)

    def test_full_bond_is_exact(self, order: Any, transposed: bool) -> None:
        place = structure(order, transposed)
        weight = torch.randn(place.shape, dtype=torch.float64)
        fit = tt_svd(weight, place, Truncation(place.full_bond))
        torch.testing.assert_close(fit.form.to_weight(), weight)
        assert fit.relative_error < 1e-12


@pytest.mark.parametrize("form_name", ["mpo", "tree", "mera"])
@pytest.mark.parametrize("order", ORDERS, ids=["morton", "permutation"])
def test_layer_computes_with_its_weight(order: Any, form_name: str) -> None:
    place = structure(order, form_name=form_name)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in place.core_shapes(place.bonds(3))]
    layer = nn.Linear(48, 64, dtype=torch.float64)
    adopt(layer, "weight", cores, place)
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    expected = x @ form_of(cores, place).to_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x), expected)
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))


def compress(folder: Path, dry_run: bool = False, **options: Any) -> tuple[Path, Manifest, int]:
    torch.save(network().state_dict(), folder / "m.pt")
    orders = tuple(map(parse_order, options.pop("order")))
    recipe = make_recipe(None, {"order": orders, **options})
    done = compress_checkpoint(folder / "m.pt", folder / "m.safetensors", recipe, True, dry_run)
    return folder / "m.safetensors", done.manifest, done.nbytes


@pytest.mark.parametrize("goal", [{"bond": 6}, {"ratio": 0.5}, {"discard": 0.3}, {"max_error": 0.7}], ids=str)
@pytest.mark.parametrize("order", NAMES)
def test_load_and_expand_agree(tmp_path: Path, order: str, goal: dict[str, Any]) -> None:
    path, manifest, nbytes = compress(tmp_path, order=[f"0={order}"], **goal)
    assert nbytes == num_bytes(path)
    assert nbytes <= compress(tmp_path, True, order=[f"0={order}"], **goal)[2]
    path, manifest, _ = compress(tmp_path, order=[f"0={order}"], **goal)
    expand_checkpoint(path, tmp_path / "dense.safetensors")
    dense = network()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    x = torch.randn(7, 48)
    torch.testing.assert_close(mpoc.load(path, network())(x), dense(x), rtol=1e-4, atol=1e-5)
    layer = manifest.layers[0]
    weight = network().get_parameter("0.weight").detach()
    error = (dense.get_parameter("0.weight").detach() - weight).norm() / weight.norm()
    assert layer.relative_error == pytest.approx(error.item(), rel=1e-3)
    if order != "learned":
        assert layer.order == ("" if order == "raster" else order)


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


def test_in_memory_matches_the_file(tmp_path: Path) -> None:
    path, manifest, _ = compress(tmp_path, bond=4, order=["0=morton:3x4x4"])
    model, x = network(), torch.randn(3, 48)
    assert mpoc.compress(model, bond=4, order="0=morton:3x4x4").layers == manifest.layers
    assert torch.equal(model(x), mpoc.load(path, network())(x))


@pytest.mark.parametrize("order", NAMES[1:])
def test_config_round_trips_the_structure(tmp_path: Path, order: str) -> None:
    _, manifest, _ = compress(tmp_path, bond=4, order=[f"0={order}"])
    entries = json.loads(json.dumps(quantization_config(manifest)))["layers"]
    for layer in manifest.replaced:
        found, shapes = cores_of(layer.name, entries[layer.name])
        assert (found, shapes) == (layer.structure, layer.core_shapes)
        assert found.permutation == layer.structure.permutation
    entries["0.weight"]["order"] = [0, 0]
    with pytest.raises(MpocError, match=r"damaged quantization_config of '0.weight'"):
        cores_of("0.weight", entries["0.weight"])


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
        ({"order": ["morton:28x28"]}, "--order morton:28x28: no selected linear layer has so many inputs"),
        ({"order": ["fc=raster"]}, "--order pattern 'fc' matches no tensor"),
        ({"order": ["0=morton:3x4x4"], "form": "svd"}, "two factors, as of 0, are the same in any"),
    ],
)
def test_rejects_bad_orders(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compress(tmp_path, bond=4, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


def test_rejects_calibration(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "m.pt")
    recipe = make_recipe(None, {"bond": 4, "order": (parse_order("learned"),)})
    with pytest.raises(UsageError, match="--order does not go with --calibrate"):
        compress_checkpoint(
            tmp_path / "m.pt", tmp_path / "o.safetensors", recipe, calibration=CalibrationRequest(tmp_path)
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
