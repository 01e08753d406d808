"""A file of a network of the zoo is told by its tensors, and by all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.source import calibrates_itself
from mpoc.errors import UsageError
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.models import auto_architecture, packaged, zoo
from mpoc.models.architecture import make_network
from mpoc.models.auto_architecture import ToldArchitecture, tell_architecture
from mpoc.models.loading import open_model
from mpoc.models.zoo.cifar import densenet
from mpoc.reporting.remarks import remarks

SPECS = [
    "densenet:depth=10,growth=3", "fc2", "harada", "lenet5", "mera-cnn:hidden=8",
    "mera-cnn:hidden=64,parallel=1", "picogpt:vocab=9", "resnet:depth=8",
    "resnet:depth=14,width=2", "vgg16", "vgg19",
]  # fmt: skip


def shaped(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> ToldArchitecture:
    """What a file with tensors of these shapes tells; no file is needed."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    monkeypatch.setattr(auto_architecture, "shapes_of", lambda checkpoint: shapes)
    return tell_architecture(NoDirectory(), None)  # type: ignore[arg-type]


class NoDirectory:
    """A checkpoint whose shapes come from elsewhere."""

    is_directory = False


@pytest.mark.parametrize("spec", SPECS)
def test_every_network_of_the_zoo_is_told_and_no_other(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        state = zoo.make(spec).state_dict()
    assert {spec.partition(":")[0] for spec in SPECS} == zoo.ENTRIES.keys()
    found = shaped(state, monkeypatch)
    assert found.arch == spec and f"--arch {spec}, told by" in found.note
    name = next(name for name, value in state.items() if value.dim() == 2)
    for other in (
        {key: value for key, value in state.items() if key != name},
        state | {"more.weight": torch.empty(2, 2)},
        state | {name: torch.empty(3, 3, 3)},
    ):
        assert shaped(other, monkeypatch) == ToldArchitecture(None)


def test_two_networks_that_fit_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.ENTRIES, "other", zoo.ENTRIES["fc2"])
    monkeypatch.setitem(auto_architecture._MARKS, "other", auto_architecture._MARKS["fc2"])
    found = shaped(zoo.make("fc2").state_dict(), monkeypatch)
    assert found == ToldArchitecture(None, "its tensors fit fc2 and other: name one with --arch")


def test_open_model_takes_what_is_told_unless_another_is_asked_for(tmp_path: Path) -> None:
    save_file(zoo.make("lenet5").state_dict(), tmp_path / "m.safetensors")
    model = open_model(tmp_path / "m.safetensors", None)
    assert model.architecture == "lenet5"
    assert any(note.startswith("--arch lenet5, told by") for note in model.notes)
    assert tell_architecture(open_checkpoint(tmp_path / "m.safetensors"), "net.py:own").arch == "net.py:own"
    with pytest.raises(UsageError, match="does not fit --arch fc2"):
        open_model(tmp_path / "m.safetensors", "fc2")
    save_file({"fc1.weight": torch.ones(3, 4)}, tmp_path / "unknown.safetensors")
    with pytest.raises(UsageError, match="holds tensors, not the network's code"):
        open_model(tmp_path / "unknown.safetensors", None)


def test_options_that_make_no_network_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        state = densenet(10, 3).state_dict()
    many = {f"block1.{k}.conv.weight": torch.empty(3, 16, 3, 3) for k in range(90)}
    assert shaped(state | many, monkeypatch) == ToldArchitecture(None)  # deeper than the zoo has


PACKAGE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=40, blurred=False, slow=False):
        super().__init__()
        assert not slow or float(torch.ones(1)) == 1  # which the meta device cannot tell
        self.conv, self.fc, self.blurred = nn.Conv2d(3, width, 3), nn.Linear(width, classes), blurred

    def forward(self, x):
        x = self.conv(x).relu()
        return self.fc((nn.functional.avg_pool2d(x, 2) ** 2 if self.blurred else x).mean((2, 3)))

NETS = {"net": {}, "same": {}, "wide": {"width": 50, "slow": True}, "deep": {"width": 60}}
NETS["blurred"] = {"width": 60, "blurred": True}

def list_models(module):
    return list(NETS)

def get_model(name, weights, num_classes):
    return Net(num_classes, **NETS[name])

def get_model_weights(name):
    raise ValueError("none")
"""


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of this name with a few small networks."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "models.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged, "NETWORKS", ("torchvision",))
    monkeypatch.setattr(packaged, "_SIDE", 12)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    auto_architecture._packaged.cache_clear()
    yield import_module("torchvision.models")
    auto_architecture._packaged.cache_clear()
    for name in ("torchvision", "torchvision.models"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("net", 7, ["torchvision:net,classes=7"]),  # "same" computes the same
        ("wide", 1000, ["torchvision:wide"]),
        ("deep", 5, ["torchvision:deep,classes=5", "torchvision:blurred,classes=5"]),
    ],
)
def test_networks_of_packages_are_told_by_what_they_compute(
    torchvision: Any, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, expected: list[str]
) -> None:
    state = torchvision.get_model(name, None, classes).state_dict()
    found = shaped(state, monkeypatch)
    assert found.arch == (expected[0] if len(expected) == 1 else None)
    assert all(arch in found.note for arch in expected)
    assert shaped(state | {"more.weight": torch.empty(2, 2)}, monkeypatch) == ToldArchitecture(None)


def test_networks_are_told_apart_with_the_same_weights_each_time(
    torchvision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def unchanged(value: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        seen.append(value.flatten().clone())
        return value

    monkeypatch.setattr(packaged, "_stirred", unchanged)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        assert len(packaged._distinct(["torchvision:deep", "torchvision:blurred"])) == 2
        assert torch.equal(torch.get_rng_state(), before)
        states.append(torch.cat(seen))
        seen.clear()
    assert torch.equal(*states)


def test_files_of_packaged_networks_need_no_options(torchvision: Any, tmp_path: Path) -> None:
    model, output = tmp_path / "m.pt", tmp_path / "o.safetensors"
    torch.save(torchvision.get_model("net", None, 7).state_dict(), model)
    recipe = make_recipe(None, {"size": 0.75, "effort": "fast"})
    assert calibrates_itself(recipe, model, None)
    done = compress_checkpoint(model, output, recipe, calibrate=CalibrationRequest("self", 8))
    assert done.manifest.architecture == {"factory": "torchvision:net,classes=7"}
    assert done.manifest.calibration["data"]["name"] == "self-made images"
    assert "architecture torchvision:net,classes=7" in remarks(done.manifest)
    assert mpoc.load(output)(torch.rand(2, 3, 12, 12)).shape == (2, 7)


def test_messages_on_networks_of_packages(torchvision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, said in (
        ("torchvision:nett", "has no network 'nett'; did you mean 'net'"),
        ("torchvision:net,depth=3", "not of the form torchvision:NAME"),
    ):
        with pytest.raises(UsageError, match=said):
            make_network(arch)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UsageError, match="torchvision cannot be imported") as caught:
        make_network("torchvision:net")
    assert caught.value.hint == "pip install torchvision"
