"""Files whose layers are sums of an MPO and a low-rank part, through everything that reads them."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import mpoc
import mpoc.hf  # registers
from mpoc.cli.tables import print_report
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.plan import LayerPlan, make_plan
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import parse_input_shape
from mpoc.compression.selection import select
from mpoc.errors import MpocError, UsageError
from mpoc.io.hub_directory import cores_of
from mpoc.io.manifest import MANIFEST_FILE
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_checkpoint, open_compressed
from mpoc.io.safetensors_header import read_header
from mpoc.io.safetensors_writer import Entry
from mpoc.reporting.summary import report_dict, to_csv
from mpoc.train.output import tuned_manifest
from tests.nn.layers import NETWORKS
from tests.support.hub_models import answer, auto, tiny
from tests.support.programs import assert_exports_alike
from tests.support.sums import RANK, compress_to_sums, sum_weight

KINDS = ("linear, padded", "conv2d with its strides", "transposed conv1d", "embedding", "lstm", "attention")


def compressed(network: nn.Module, folder: Path, **options: Any) -> Path:
    torch.save(network.state_dict(), folder / "m.pt")
    output = folder / "m.mpo.safetensors"
    compress_to_sums(folder / "m.pt", output, embeddings=True, **options)
    return output


def network() -> nn.Module:
    """24 → 18 → 12."""
    return nn.Sequential(nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 12))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """``network()`` as sums."""
    return compressed(network(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_and_expands_to_what_it_says(kind: str, tmp_path: Path) -> None:
    network, x = NETWORKS[kind]()
    path = compressed(network, tmp_path)
    manifest, stored = read_manifest(path), load_file(path)
    assert {layer.form for layer in manifest.replaced} == {"svd+mpo"}
    loaded = mpoc.load(path, copy.deepcopy(network)).eval()
    state = loaded.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    expand_checkpoint(path, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    for layer in manifest.replaced:
        cores = [stored[name] for name in layer.core_names]
        assert layer.num_stored == sum(core.numel() for core in cores)
        expected = sum_weight(cores, layer.structure).float()
        torch.testing.assert_close(dense[layer.name], expected, rtol=1e-5, atol=1e-5)
    network.load_state_dict(dense, strict=True)
    torch.testing.assert_close(loaded(x), network.eval()(x), rtol=1e-4, atol=1e-4)


def test_same_input_same_bytes_within_the_prediction(tmp_path: Path) -> None:
    network, _ = NETWORKS["linear"]()
    torch.save(network.state_dict(), tmp_path / "m.pt")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    done = compress_to_sums(tmp_path / "m.pt", first)
    compress_to_sums(tmp_path / "m.pt", second)
    assert first.read_bytes() == second.read_bytes()
    planned = compress_to_sums(tmp_path / "m.pt", first, dry_run=True)
    assert planned.manifest.rho == done.manifest.rho
    assert done.nbytes <= planned.nbytes <= done.nbytes + 64


@pytest.mark.parametrize("change", ["missing", "another rank", "transposed", "another dtype"])
def test_cores_that_contradict_the_manifest_are_named(path: Path, change: str) -> None:
    tensors, metadata = load_file(path), read_header(path).metadata
    name = read_manifest(path).replaced[0].core_names[-1]
    wrong = {
        "another rank": tensors[name][:1],
        "transposed": tensors[name].transpose(0, 2).contiguous(),
        "another dtype": tensors[name].half(),
    }
    tensors = {key: value for key, value in tensors.items() if key != name}
    save_file(tensors | ({name: wrong[change]} if change in wrong else {}), path, metadata)
    for read in (
        lambda: mpoc.load(path, network()),
        lambda: expand_checkpoint(path, path.with_name("dense.safetensors")),
    ):
        with pytest.raises(MpocError, match=rf"m\.mpo\.safetensors: core '{name}' is .*; the manifest says"):
            read()
    assert not path.with_name("dense.safetensors").exists()


def test_after_training_it_is_a_sum_still(path: Path) -> None:
    manifest, stored = read_manifest(path), open_compressed(path)
    entries = [Entry(info, lambda name=name: stored.read(name)) for name, info in stored.infos.items()]  # type: ignore[misc]
    tuned = tuned_manifest(manifest, entries, {"steps": 1})
    for before, after in zip(manifest.replaced, tuned.replaced, strict=True):
        assert (after.low_rank, after.relative_error, after.entropies) == (RANK, None, ())
        assert after.core_shapes == before.core_shapes


def test_the_report_says_so(path: Path) -> None:
    manifest = read_manifest(path)
    row = json.loads(json.dumps(report_dict(manifest, 1)))["layers"][0]
    assert (row["form"], row["low_rank"], row["entropies"]) == ("svd+mpo", RANK, [])
    line = next(csv.DictReader(io.StringIO(to_csv(manifest))))
    assert (line["form"], line["low_rank"], line["bonds"]) == ("svd+mpo", str(RANK), "1×3×3×1")
    text = io.StringIO()
    print_report(Console(file=text, width=200), manifest, 1)
    assert f"3 3 + r {RANK} " in text.getvalue()


def test_an_exported_program_computes_the_sum(path: Path, tmp_path: Path) -> None:
    assert_exports_alike(path, network, tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a kind as sums, each made only once."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind).save_pretrained(folder / "original")
        compress_to_sums(folder / "original", folder / "compressed", embeddings=True)
        return folder / "compressed"

    return make


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral"])
class TestHub:
    def test_from_pretrained_computes_the_sums(
        self, directory: Callable[[str], Path], tmp_path: Path, kind: str
    ) -> None:
        folder = directory(kind)
        expand_checkpoint(folder, tmp_path / "dense")
        model = auto(kind, folder)
        expected = answer(auto(kind, tmp_path / "dense"))
        torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-4)
        model.train()
        model(input_ids=torch.arange(2, 18).reshape(2, 8))[0].square().sum().backward()
        cores = {name: p for name, p in model.named_parameters() if "cores." in name}
        unused = [name for name, core in cores.items() if core.grad is None]
        assert cores and unused == []

    def test_saved_again_it_says_the_same(
        self, directory: Callable[[str], Path], tmp_path: Path, kind: str
    ) -> None:
        folder = directory(kind)
        model = auto(kind, folder)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / MANIFEST_FILE).exists()
        before, after = read_manifest(folder), read_manifest(tmp_path)
        ranks = [
            {layer.name: (layer.low_rank, layer.bonds, layer.num_stored) for layer in one.replaced}
            for one in (before, after)
        ]
        assert ranks[0] == ranks[1] != {}
        assert after.num_parameters == before.num_parameters
        assert torch.equal(answer(auto(kind, tmp_path)), answer(model))

    def test_config_and_card(self, directory: Callable[[str], Path], kind: str) -> None:
        folder = directory(kind)
        layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        record = read_manifest(folder).replaced[0]
        entry = layers[record.name]
        assert (entry["form"], entry["low_rank"]) == ("svd+mpo", RANK)
        assert cores_of(record.name, entry) == (record.structure, record.core_shapes)
        assert f"+ r {RANK} |" in (folder / "README.md").read_text()
        for wrong in (*({"low_rank": rank} for rank in (10**9, -1, "2", 0)), {"form": "mpo"}):
            with pytest.raises(MpocError, match=r"config\.json: damaged quantization_config"):
                cores_of(record.name, entry | wrong)


def test_a_form_to_be_asked_for(tmp_path: Path) -> None:
    recipe = make_recipe(None, {"ratio": 0.5, "form": "svd+mpo"})
    assert recipe.with_form(calibrated=True).form == "svd+mpo"
    with pytest.raises(UsageError, match=r"--form svd\+mpo compares what layers do: it needs --calibrate"):
        recipe.with_form(calibrated=False)
    with pytest.raises(UsageError, match=r"--form svd\+mpo shares out a budget: it needs --ratio"):
        make_recipe(None, {"bond": 4, "form": "svd+mpo"}).with_form(calibrated=True)
    (tmp_path / "r.toml").write_text('ratio = 0.5\n[layer."fc*"]\nform = "svd+mpo"\n')
    with pytest.raises(UsageError, match="needs --calibrate"):
        make_recipe(tmp_path / "r.toml", {}).with_form(calibrated=False)


def planned(tmp_path: Path, **options: Any) -> LayerPlan:
    torch.save({"c.weight": torch.randn(8, 8, 3, 3)}, tmp_path / "m.pt")
    recipe = make_recipe(None, {"ratio": 0.9, "form": "svd+mpo"} | options)
    (plan,) = make_plan(select(open_checkpoint(tmp_path / "m.pt")), recipe)
    return plan


def test_a_plan_counts_both_parts(tmp_path: Path) -> None:
    chain = planned(tmp_path)
    assert (chain.record().form, chain.structure.form) == ("mpo", "mpo")
    structure, goal = chain.structure.as_form("svd+mpo"), replace(chain.truncation, rank=5)
    record = replace(chain, structure=structure, goal=goal).record()
    assert (record.form, record.low_rank) == ("svd+mpo", 5)
    assert record.num_stored == chain.record().num_stored + 5 * (8 + 72)
    assert record.num_stored == sum(math.prod(shape) for shape in record.core_shapes)


def test_whole_maps_are_no_sums(tmp_path: Path) -> None:
    sizes = (parse_input_shape("6x6"),)
    with pytest.raises(UsageError, match=r"--form svd\+mpo is of kernels, not of whole maps"):
        planned(tmp_path, conv="map", input_shape=sizes)
