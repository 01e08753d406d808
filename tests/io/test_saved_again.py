"""Directories that transformers saved again have no manifest: what config.json and the headers still tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpoc.hf  # noqa: F401  # registers
from mpoc.compression.expand import expand_checkpoint
from mpoc.errors import MpocError
from mpoc.io.manifest import MANIFEST_FILE, LayerRecord
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.loading import load
from mpoc.reporting.summary import report_dict, summary
from tests.hf.test_quantizer import CANNOT_TAKE
from tests.support.hub_models import AUTO, Compressed, Make, answer, auto, compress_once, tiny
from tests.support.marks import slow_except
from tests.support.process import Here

transformers: Any = import_module("transformers")  # its own types are not complete


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return compress_once(tmp_path_factory)


def saved_again(small: Compressed, kind: str, folder: Path) -> Path:
    """The compressed directory as ``save_pretrained`` writes it."""
    auto(kind, small.path).save_pretrained(folder / "again")
    assert not (folder / "again" / MANIFEST_FILE).exists()
    return folder / "again"


def of_structure(layers: list[LayerRecord]) -> dict[str, tuple[Any, ...]]:
    return {layer.name: (layer.structure, layer.bonds, layer.num_stored, layer.padding) for layer in layers}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", slow_except(AUTO, "gpt2"))
class TestEveryArchitecture:
    def test_layers_match_the_manifest(self, make: Make, tmp_path: Path, kind: str, embeddings: bool) -> None:
        small = make(kind, embeddings=embeddings)
        before, after = read_manifest(small.path), read_manifest(saved_again(small, kind, tmp_path))
        assert of_structure(after.replaced) == of_structure(before.replaced) != {}
        assert after.num_parameters == before.num_parameters
        assert (after.rho, after.source.num_parameters) == (before.rho, before.source.num_parameters)
        assert after.vectors == before.vectors

    def test_expands_to_the_same_network(
        self, make: Make, tmp_path: Path, kind: str, embeddings: bool
    ) -> None:
        small = make(kind, embeddings=embeddings)
        expand_checkpoint(saved_again(small, kind, tmp_path), tmp_path / "dense")
        found, expected = (
            load_file(path / "model.safetensors") for path in (tmp_path / "dense", small.expanded)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert torch.equal(answer(auto(kind, tmp_path / "dense")), answer(auto(kind, small.expanded)))

    @pytest.mark.slow
    def test_loads_into_a_network(self, make: Make, tmp_path: Path, kind: str, embeddings: bool) -> None:
        if kind in CANNOT_TAKE:
            pytest.skip("mpoc.load does not rename or stack tensors")
        small = make(kind, embeddings=embeddings)
        loaded = load(saved_again(small, kind, tmp_path), tiny(kind), weights="cores")
        assert torch.equal(answer(loaded), answer(auto(kind, small.path)))


def test_unknown_facts_are_null(make: Make, tmp_path: Path) -> None:
    manifest = read_manifest(saved_again(make("bert"), "bert", tmp_path))
    assert not manifest.is_complete and read_manifest(make("bert").path).is_complete
    report = report_dict(manifest, 1000)
    assert [report["source"][key] for key in ("name", "nbytes", "fingerprint")] == [None] * 3
    unknown = ("rho_selected", "layers_selected", "bytes_before")
    assert [report["totals"][key] for key in unknown] == [None] * 3
    for layer in report["layers"]:
        assert layer["relative_error"] is None
        assert layer["entropies"] == layer["entropies_of_weight"] == ()
    assert "bert.embeddings.word_embeddings.weight" in report["left_alone"]
    lines = summary(manifest, 1000, predicted=False)
    assert not any("selected)" in line or "None" in line for line in lines)
    assert lines[1].endswith("%); on disk 1 kB")
    assert lines[3].startswith("mpoc.json is missing (transformers does not save it): errors, entropies")


def test_ignores_an_outdated_manifest(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("bert").path, tmp_path / "tuned")
    model = auto("bert", tmp_path / "tuned")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.cores[0].mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / MANIFEST_FILE).exists()
    assert {layer.relative_error for layer in read_manifest(tmp_path / "tuned").layers} == {None}
    expand_checkpoint(tmp_path / "tuned", tmp_path / "dense")
    assert not (tmp_path / "dense" / MANIFEST_FILE).exists()
    assert torch.allclose(answer(auto("bert", tmp_path / "dense")), answer(model), atol=1e-5)


def test_part_saved_alone_requires_transformers(make: Make, tmp_path: Path) -> None:
    auto("bert", make("bert").path).bfloat16().bert.save_pretrained(tmp_path / "part")
    with pytest.raises(MpocError, match=r"is not among the weights that config.json describes"):
        read_manifest(tmp_path / "part")
    transformers.AutoModel.from_pretrained(tmp_path / "part").save_pretrained(tmp_path / "again")
    replaced = read_manifest(tmp_path / "again").replaced
    assert replaced and {layer.stored_dtype for layer in replaced} == {"bfloat16"}


def test_report_and_expand_work(make: Make, tmp_path: Path, here: Here) -> None:
    path = saved_again(make("bert"), "bert", tmp_path)
    done = here("report", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bert.encoder.layer.0.attention.self.query" in done.stdout
    assert "mpoc.json is missing" in done.stdout
    layers = json.loads(here("report", path, "--json").stdout)["layers"]
    assert layers and {layer["relative_error"] for layer in layers} == {None}
    assert here("expand", path, "-o", tmp_path / "dense").returncode == 0


def test_reads_trained_shards_in_another_dtype(make: Make, tmp_path: Path) -> None:
    model = auto("gpt2", make("gpt2", embeddings=True).path).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    manifest = read_manifest(tmp_path / "again")
    assert {layer.stored_dtype for layer in manifest.replaced} == {"bfloat16"}
    loaded = load(tmp_path / "again", tiny("gpt2").bfloat16(), weights="cores")
    assert torch.equal(answer(loaded), answer(model))


def test_counts_tensors_that_the_index_omits(make: Make, tmp_path: Path) -> None:
    path = saved_again(make("bert"), "bert", tmp_path)
    count = read_manifest(path).num_parameters
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(state | {"old": torch.ones(50, 50)}, path / "model-1.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_manifest(path).num_parameters == count + 2500


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("manifest format 4, this mpoc reads format 1 or 2 or 3", lambda q: q.update(format=4)),
        ("damaged quantization_config", lambda q: q.pop("layers")),
        ("damaged quantization_config", lambda q: q["layers"].update(x={})),
        ("damaged quantization_config", lambda q: q["layers"].update(x=None)),
        ("damaged quantization_config", lambda q: first(q).update(bonds=[1, 2, 3])),
        ("damaged quantization_config", lambda q: first(q).update(shape=[10**9, 10**9])),
        ("not compressed by mpoc", lambda q: q.update(quant_method="gptq")),
    ],
)
def test_rejects_damaged_configuration(
    make: Make, tmp_path: Path, message: str, change: Callable[[dict[str, Any]], object]
) -> None:
    path = saved_again(make("bert"), "bert", tmp_path)
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MpocError, match=message):
        read_manifest(path)


def first(quantization_config: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = next(iter(quantization_config["layers"].values()))
    return layer
