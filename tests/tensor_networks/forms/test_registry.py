"""The registry of forms: what it names exists, and one more line in it is all that a new form needs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpoc
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.io.manifest_reader import read_manifest
from mpoc.reporting.contents import read_files
from mpoc.reporting.html import page
from mpoc.reporting.network_diagram import diagrams_of
from mpoc.tensor_networks.forms import FORMS, FormInfo
from mpoc.tensor_networks.forms.form import Form
from tests.tensor_networks.forms.kronecker import KroneckerTopology

HERE = "tests.tensor_networks.forms.kronecker"


@pytest.mark.parametrize("name", FORMS)
def test_registered_forms_exist(name: str) -> None:
    info = FORMS[name]
    assert info.name == name and issubclass(info.form_class, Form) and callable(info.fit_function)
    assert set(info.parts) <= FORMS.keys()


@pytest.fixture
def kronecker(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a form that is registered for one test."""
    info = FormInfo("kronecker", "sum", KroneckerTopology(), f"{HERE}:Kronecker", f"{HERE}:fit_kronecker")
    monkeypatch.setitem(FORMS, "kronecker", info)
    return "kronecker"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 24), nn.ReLU(), nn.Embedding(32, 8), nn.Conv2d(8, 16, 3))


@pytest.mark.parametrize("goal", [{"bond": 2}, {"ratio": 0.4}], ids=["bond", "ratio"])
def test_new_form_goes_all_the_way(goal: dict[str, float], kronecker: str, tmp_path: Path) -> None:
    dense = network()
    torch.save(dense.state_dict(), tmp_path / "m.pt")
    output = tmp_path / "m.mpo.safetensors"
    recipe = make_recipe(None, goal | {"form": kronecker, "embeddings": True, "sites": 3})
    compress_checkpoint(tmp_path / "m.pt", output, recipe)
    manifest = read_manifest(output)
    assert {layer.form for layer in manifest.layers} == {kronecker}
    for layer in manifest.replaced:
        weight = dense.state_dict()[layer.name]
        tensor = layer.structure.topology
        assert isinstance(tensor, KroneckerTopology) and len(diagrams_of(layer)) == 1
        assert layer.num_stored < weight.numel() and layer.relative_error is not None

    loaded = mpoc.load(output, copy.deepcopy(dense))
    expand_checkpoint(output, tmp_path / "dense.safetensors")
    expanded = network()
    expanded.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    for layer in manifest.replaced:
        weight, now = dense.state_dict()[layer.name], expanded.state_dict()[layer.name]
        error = float((now - weight).norm() / weight.norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-4)
    x, ids, image = torch.randn(3, 36), torch.tensor([0, 31, 7]), torch.randn(1, 8, 5, 5)
    for place, given in ((0, x), (2, ids), (3, image)):
        torch.testing.assert_close(loaded[place](given), expanded[place](given), rtol=1e-4, atol=1e-5)  # type: ignore[index]
    text = page(read_files(output, []))
    assert text.count('<svg class="network"') == len(manifest.replaced)
