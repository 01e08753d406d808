"""Files that earlier versions wrote are read, loaded and expanded as they were then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mpoc import load
from mpoc.compression.expand import expand_checkpoint
from mpoc.io.manifest_reader import parse_manifest, read_manifest
from tests.kept.make import IDS, Net, Parts, images

FOLDER = Path(__file__).parent / "kept"
FILE, DIRECTORY = FOLDER / "format-1.safetensors", FOLDER / "format-1"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "format-1.json").read_text("utf-8"))


def test_reads_format_1_file() -> None:
    manifest = read_manifest(FILE)
    assert manifest.tool == "mpoc 0.1.0"
    assert [layer.form for layer in manifest.layers] == ["mpo", "svd+mpo", "mpo", "svd", "dense"]
    assert [layer.num_stored for layer in manifest.layers] == [100, 864, 230, 280, 64]
    assert manifest.num_parameters == 1622
    assert manifest.rho == 1474 / 2960
    conv, added, chain, rank, head = manifest.layers
    assert (conv.kind, conv.output_factors, conv.input_factors) == ("conv2d", (1, 8), (9, 2))
    assert (added.bonds, added.low_rank) == ((1, 2, 1), 4)
    assert (chain.bonds, chain.entropies) == ((1, 5, 5, 1), (1.56615, 1.5515))
    assert (rank.relative_error, rank.held_out_error) == (0.93194, 0.675444)
    assert rank.same_size is not None
    assert rank.same_size["plain svd"] == 0.357009
    assert head.reason == "the recipe leaves it dense"
    assert manifest.options == {"ratio": 0.6, "seed": 0}
    assert manifest.architecture == {"factory": "tests/kept/make.py:Net"}
    assert manifest.left_alone == {"alone.weight": "--exclude"}
    assert (manifest.calibration["samples"], manifest.calibration["held_out"]) == (56, 8)
    assert parse_manifest(manifest.to_json(), FILE) == manifest


def test_format_1_file_computes_as_before() -> None:
    with torch.no_grad():
        found = load(FILE, Net())(images(3)).flatten()
    torch.testing.assert_close(found, torch.tensor(EXPECTED["outputs"]), rtol=1e-5, atol=1e-6)


def test_format_1_file_expands_as_before(tmp_path: Path) -> None:
    expand_checkpoint(FILE, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert {name: tensor.shape for name, tensor in dense.items()} == {
        name: tensor.shape for name, tensor in Net().state_dict().items()
    }
    for name, numbers in EXPECTED["weights"].items():
        torch.testing.assert_close(
            dense[name].flatten()[::7], torch.tensor(numbers), rtol=1e-5, atol=1e-6, msg=name
        )
    network = Net()
    network.load_state_dict(dense)
    with torch.no_grad():
        found = network(images(3)).flatten()
    torch.testing.assert_close(found, torch.tensor(EXPECTED["outputs"]), rtol=1e-5, atol=1e-6)


def test_reads_format_1_directory(tmp_path: Path) -> None:
    manifest = read_manifest(DIRECTORY)
    conv, embed = manifest.layers
    assert (conv.kind, conv.bonds, conv.stored_dtype) == ("convmap", (1, 3, 4, 1), "bfloat16")
    assert conv.geometry is not None
    assert (conv.geometry.size, conv.geometry.kernel_size, conv.geometry.groups) == ((4, 4), (3, 3), 1)
    assert conv.entropies_of_weight == (1.01047, None)
    assert (embed.kind, embed.padding) == ("embedding", (1, 0))
    assert embed.structure.padded == tuple(EXPECTED["directory"]["padded"])
    assert manifest.tied == {"head.weight": "embed.weight"}
    shutil.copytree(DIRECTORY, tmp_path / "saved")
    (tmp_path / "saved" / "mpoc.json").unlink()  # as transformers leaves it
    for found, was in zip(read_manifest(tmp_path / "saved").layers, manifest.layers, strict=True):
        assert (found.structure, found.bonds, found.core_shapes) == (
            was.structure,
            was.bonds,
            was.core_shapes,
        )


def test_format_1_directory_computes_as_before() -> None:
    x = images(1)[0, 0, :4].reshape(1, 2, 4, 4)
    with torch.no_grad():
        mapped, scores = load(DIRECTORY, Parts())(x, torch.tensor(IDS))
    for found, name in ((mapped.flatten(), "map"), (scores.flatten()[::5], "scores")):
        torch.testing.assert_close(found, torch.tensor(EXPECTED["directory"][name]), rtol=1e-5, atol=1e-5)
