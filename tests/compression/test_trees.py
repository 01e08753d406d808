"""Files whose layers are trees, through everything that reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpoc
import mpoc.hf  # registers
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.write import Compression
from mpoc.errors import MpocError, UsageError
from mpoc.io.hub_directory import cores_of
from mpoc.io.manifest_reader import read_manifest
from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms import FORMS as REGISTRY
from tests.nn.layers import NETWORKS
from tests.support.checkpoints import mlp_state, relative_error
from tests.support.hub_models import Make, answer, auto, compress_once
from tests.support.process import Mpoc
from tests.support.programs import assert_exports_alike

FORMS = ("tree",)
KINDS = ("linear, padded", "conv2d with its strides", "transposed conv1d", "embedding", "lstm", "attention")


def network() -> nn.Module:
    """24 → 48 → 12."""
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 12))


def compressed(network: nn.Module, folder: Path, **options: Any) -> Compression:
    """Within the size that was predicted for it."""
    torch.save(network.state_dict(), folder / "m.pt")
    recipe = make_recipe(None, {"embeddings": True, "allow_growth": True} | options)
    output = folder / "m.mpo.safetensors"
    planned = compress_checkpoint(folder / "m.pt", output, recipe, dry_run=True)
    done = compress_checkpoint(folder / "m.pt", output, recipe)
    assert planned.nbytes >= done.nbytes == output.stat().st_size
    return done


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_and_expands_to_what_it_says(kind: str, form: str, tmp_path: Path) -> None:
    network, _ = NETWORKS[kind]()
    done = compressed(network, tmp_path, bond=3, form=form)
    manifest, stored = read_manifest(done.output), load_file(done.output)
    assert manifest == done.manifest and {layer.form for layer in manifest.replaced} == {form}
    state = mpoc.load(done.output, copy.deepcopy(network)).state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    expand_checkpoint(done.output, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    for layer in manifest.replaced:
        weight = network.state_dict()[layer.name]
        assert layer.num_stored == sum(stored[name].numel() for name in layer.core_names)
        assert len(layer.entropies) in (len(layer.bonds), 0)
        assert layer.relative_error == pytest.approx(relative_error(weight, dense[layer.name]), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "goal", [{"ratio": 0.5}, {"size": 5500}, {"max_error": 0.7, "allow_growth": False}, {"bond": 4}]
)
def test_goals_are_kept(goal: dict[str, Any], form: str, tmp_path: Path) -> None:
    done = compressed(network(), tmp_path, form=form, sites=3, **goal)
    manifest = read_manifest(done.output)
    assert {layer.form for layer in manifest.replaced} == {form}
    assert manifest.rho_selected <= goal.get("ratio", 1)
    assert done.output.stat().st_size <= goal.get("size", 1e9)
    for layer in manifest.replaced:
        assert len(layer.output_factors) == 3
        assert layer.relative_error is not None and layer.relative_error <= goal.get("max_error", 1)
        assert max(layer.bonds) <= goal.get("bond", 1e9)


@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_gives_single_layers_a_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'bond = 3\n[layer."0"]\nform = "{form}"\nshape = "2x3x4:4x3x4"\n')
    torch.save(network().state_dict(), tmp_path / "m.pt")
    recipe = make_recipe(tmp_path / "r.toml", {})
    first, second = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", recipe).manifest.layers
    assert (first.form, first.output_factors, first.input_factors) == (form, (4, 3, 4), (2, 3, 4))
    assert second.form == "mpo" and len(first.bonds) == REGISTRY[form].topology.num_bonds(3)


@pytest.mark.parametrize("form", FORMS)
def test_whole_maps_are_refused(form: str) -> None:
    conv = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(UsageError, match=f"--form {form} is of kernels, not of whole maps"):
        mpoc.compress(conv, bond=2, form=form, conv="map", input_shape=(1, 8, 6, 6))


@pytest.mark.parametrize("form", FORMS)
def test_the_command_line_there_and_back(run: Mpoc, tmp_path: Path, form: str) -> None:
    state = mlp_state()
    torch.save(state, tmp_path / "mlp.pt")
    done = run("compress", tmp_path / "mlp.pt", "--form", form, "--ratio", "0.5", "-o", "o.safetensors")
    assert done.returncode == 0, done.stderr
    recipe = make_recipe(None, {"form": form, "ratio": 0.5})
    again = compress_checkpoint(tmp_path / "mlp.pt", tmp_path / "o.safetensors", recipe)
    assert (run.folder / "o.safetensors").read_bytes() == again.output.read_bytes()
    text = run("report", "o.safetensors").stdout
    assert run("expand", "o.safetensors", "-o", "d.safetensors").returncode == 0
    dense = load_file(run.folder / "d.safetensors")
    for layer in again.manifest.replaced:
        assert layer.form == form and " ".join(map(str, layer.bonds)) in text
        error = relative_error(state[layer.name], dense[layer.name])
        assert layer.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_program_computes_the_same(form: str, tmp_path: Path) -> None:
    path = compressed(network(), tmp_path, bond=3, form=form).output
    assert_exports_alike(path, network, tmp_path)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return compress_once(tmp_path_factory)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral"])
class TestHub:
    """gpt2 stores weights transposed and ties its head, mixtral holds experts."""

    def test_from_pretrained_computes_the_same(self, make: Make, kind: str, form: str) -> None:
        small = make(kind, form=form, embeddings=True)
        model = auto(kind, small.path)
        torch.testing.assert_close(answer(model), answer(auto(kind, small.expanded)), rtol=0, atol=1e-5)
        model.train()
        model(input_ids=torch.arange(2, 18).reshape(2, 8))[0].square().sum().backward()
        cores = {name: p for name, p in model.named_parameters() if "cores." in name}
        assert cores and [name for name, core in cores.items() if core.grad is None] == []

    def test_saved_again_it_says_the_same(self, make: Make, tmp_path: Path, kind: str, form: str) -> None:
        small = make(kind, form=form, embeddings=True)
        model = auto(kind, small.path)
        model.save_pretrained(tmp_path)
        before, after = (
            {layer.name: (layer.form, layer.bonds, layer.num_stored) for layer in read_manifest(one).replaced}
            for one in (small.path, tmp_path)
        )
        assert before == after != {}
        assert torch.equal(answer(auto(kind, tmp_path)), answer(model))

    def test_config_and_card(self, make: Make, kind: str, form: str) -> None:
        folder = make(kind, form=form, embeddings=True).path
        layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        record = read_manifest(folder).replaced[0]
        entry = layers[record.name]
        assert entry["form"] == form and cores_of(record.name, entry) == (
            record.structure,
            record.core_shapes,
        )
        assert f"| {', '.join(map(str, record.bonds))} |" in (folder / "README.md").read_text()
        for wrong in ({"form": "mpo"}, {"bonds": [*record.bonds, 2]}):
            with pytest.raises(MpocError, match=r"config\.json: damaged quantization_config"):
                cores_of(record.name, entry | wrong)


@pytest.mark.parametrize("form", FORMS)
def test_cores_are_stored_in_the_dtype_asked_for(form: str, tmp_path: Path) -> None:
    done = compressed(network(), tmp_path, bond=3, form=form, dtype="bfloat16")
    stored = load_file(done.output)
    for layer in done.manifest.replaced:
        assert {stored[name].dtype for name in layer.core_names} == {torch.bfloat16}
        weight = torch.load(tmp_path / "m.pt")[layer.name]
        exact = decompose(weight, layer.structure, Truncation(3)).relative_error
        assert layer.relative_error == pytest.approx(exact, rel=0.05)
