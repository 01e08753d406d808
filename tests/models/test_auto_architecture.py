"""A file of a network of the zoo is told by its tensors, and by all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpoc.errors import UsageError
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.models import auto_architecture, zoo
from mpoc.models.auto_architecture import ToldArchitecture, tell_architecture
from mpoc.models.loading import open_model
from mpoc.models.zoo.cifar import densenet

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
