from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mpoc
from mpoc.models import zoo
from tests.support.process import Here


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state = {
        "conv5_1.weight": torch.randn(32, 32, 3, 3),
        "conv5_1.bias": torch.randn(32),
        "fc.weight": torch.randn(64, 48),
    }
    torch.save(state, tmp_path / "vgg.pt")
    return tmp_path / "vgg.pt"


def test_conv_map_compresses_a_whole_map(here: Here, model: Path) -> None:
    arguments = ["--bond", 4, "--shape", "conv5_1=2x8x8:2x8x8", "--layers", "conv5_1", "--json", "--quiet"]
    done = here("compress", model, "--conv", "map", "--input-shape", "conv5_1=2x2", *arguments)
    assert done.returncode == 0, done.stderr
    (layer,) = json.loads(done.stdout)["layers"]
    assert (layer["kind"], layer["num_original"]) == ("convmap", 32 * 32 * 9)
    assert (layer["output_factors"], layer["input_factors"]) == ([2, 8, 8], [2, 8, 8])
    assert layer["geometry"]["size"] == layer["geometry"]["output_size"] == [2, 2]
    stored = load_file(here.folder / "vgg.mpo.safetensors")
    assert [stored[f"conv5_1.cores.{k}"].shape[1:3] for k in range(3)] == [(2, 2), (8, 8), (8, 8)]


@pytest.mark.slow
def test_zoo_network_supplies_input_sizes(here: Here, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.make("lenet5").eval()
    torch.save(network.state_dict(), tmp_path / "lenet.pt")
    options = ["--arch", "lenet5", "--conv", "map", "--layers", "conv2", "--bond", 100000, "--allow-growth"]
    done = here("compress", tmp_path / "lenet.pt", *options, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    (layer,) = json.loads(done.stdout)["layers"]
    seen: list[torch.Size] = []
    network.get_submodule("conv2").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    x = torch.randn(2, *zoo.example("lenet5").shape[1:])
    y = network(x)
    assert layer["geometry"]["size"] == list(seen[0][2:])
    loaded = mpoc.load(here.folder / "lenet.mpo.safetensors")
    torch.testing.assert_close(loaded(x), y, rtol=0, atol=1e-4)


def test_expand_requires_project_for_truncated_maps(here: Here, model: Path) -> None:
    shape = ["--conv", "map", "--input-shape", "conv5_1=4x4:stride=1,padding=1", "--layers", "conv5_1"]
    done = here("compress", model, *shape, "--bond", 2, "--shape", "2x8x32:2x8x32", "-o", "m.safetensors")
    assert done.returncode == 0, done.stderr
    refused = here("expand", "m.safetensors", "-o", "d.safetensors")
    assert refused.returncode == 1
    assert "error: layer conv5_1: its map is no longer a convolution" in refused.stderr
    assert "hint: --project" in refused.stderr
    done = here("expand", "m.safetensors", "-o", "d.safetensors", "--project")
    assert done.returncode == 0, done.stderr
    assert "conv5_1: nearest kernel, 0." in done.stderr
    assert load_file(here.folder / "d.safetensors")["conv5_1.weight"].shape == (32, 32, 3, 3)


def test_conv_map_requires_an_input_size(here: Here, model: Path) -> None:
    done = here("compress", model, "--bond", 4, "--conv", "map")
    assert (done.returncode, list(here.folder.iterdir())) == (2, [])
    assert "error: shape for layer conv5_1: as one map (--conv map) a convolution needs" in done.stderr
    assert "hint: --input-shape conv5_1=HxW" in done.stderr
