"""``--form mera`` from a command line to a network again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpoc
import mpoc.hf  # registers
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.io.manifest_reader import read_manifest
from tests.support.checkpoints import contents, network_state, save_directory
from tests.support.hub_models import answer, auto, compress, tiny
from tests.support.process import Here


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fit finds is tested with it."""
    monkeypatch.setattr("mpoc.tensor_networks.fit.mera._MOST_STEPS", 20)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40))


def test_compress_report_expand_and_load(here: Here) -> None:
    torch.save(small().state_dict(), here.folder / "m.pt")
    done = here("compress", "m.pt", "--form", "mera", "--bond", 4, "-o", "a.safetensors")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(here.folder / "a.safetensors")
    for layer in manifest.replaced:
        assert (layer.form, layer.bonds, len(layer.output_factors)) == ("mera", (4,), 3)
        assert layer.num_stored < layer.num_original / 2
        assert f"{layer.num_original:,} → {layer.num_stored:,}" in done.stdout
    report = here("report", "a.safetensors", "--json")
    assert [layer["form"] for layer in json.loads(report.stdout)["layers"]] == ["mera", "mera"]
    dense = here.folder / "dense.safetensors"
    expanded = here("expand", "a.safetensors", "-o", dense)
    assert expanded.returncode == 0, expanded.stderr
    cores, weights = mpoc.load(here.folder / "a.safetensors", model=small()), small()
    weights.load_state_dict(load_file(dense))
    x = torch.randn(5, 48)
    with torch.no_grad():
        torch.testing.assert_close(cores(x), weights(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"bond": 3}, {"ratio": 0.3}, {"size": 20_000}, {"bond": 2, "sites": 5}])
def test_meets_every_goal_on_every_kind_of_layer(tmp_path: Path, options: dict[str, float]) -> None:
    source = save_directory(tmp_path / "m", network_state())
    recipe = make_recipe(None, {"form": "mera", "embeddings": True, **options})
    for name in ("a", "b"):
        compress_checkpoint(source, tmp_path / name, recipe)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = read_manifest(tmp_path / "a")
    assert {layer.form for layer in manifest.replaced} == {"mera"}
    kinds = {layer.kind for layer in manifest.replaced}
    assert "linear" in kinds and ("bond" not in options or {"conv2d", "embedding"} < kinds)
    if "ratio" in options:
        assert manifest.rho_selected <= options["ratio"]


def test_transformers_load_and_save_again(tmp_path: Path) -> None:
    made = compress(tiny("bert"), tmp_path, form="mera", bond=3, embeddings=True)
    model = auto("bert", made.path)
    model.save_pretrained(tmp_path / "again")
    again = auto("bert", tmp_path / "again")
    assert any("cores" in name for name in model.state_dict())
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())
    torch.testing.assert_close(answer(again), answer(model))
    torch.testing.assert_close(answer(auto("bert", made.expanded)), answer(model), rtol=1e-3, atol=1e-4)
    manifests = read_manifest(made.path).replaced, read_manifest(tmp_path / "again").replaced
    assert [layer.structure for layer in manifests[0]] == [layer.structure for layer in manifests[1]]


def test_trains_in_memory() -> None:
    model = small()
    report = mpoc.compress(model, bond=4, form="mera")
    assert 0 < report.rho < 0.5
    x, before = torch.randn(20, 48), [parameter.clone() for parameter in model.parameters()]
    loss = model(x).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert model(x).square().mean() < loss
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-error", "0.1"), "--max-error cuts bonds by a spectrum, and a MERA has none"),
        (
            ("--bond", "4", "--conv", "map", "--input-shape", "8x8"),
            "--form mera is of kernels, not of whole maps",
        ),
    ],
)
def test_rejects_unsupported_goals(here: Here, words: tuple[str, ...], message: str) -> None:
    torch.save(network_state(), here.folder / "m.pt")
    done = here("compress", "m.pt", "--form", "mera", *words, "-o", "o.safetensors")
    assert done.returncode == 2 and message in done.stderr, done.stderr
