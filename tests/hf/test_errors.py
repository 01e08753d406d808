"""What ``import mpoc.hf`` and loading refuse, and how they say so."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import mpoc
import mpoc.hf
from mpoc.errors import MpocError
from tests.support.hub_models import Make, auto, compress_once, tiny

transformers: Any = import_module("transformers")  # its own types are not complete


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return compress_once(tmp_path_factory)


def edit(folder: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with a changed config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def first(quantization_config: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = next(iter(quantization_config["layers"].values()))
    return layer


def bert_as_gpt2(path: Path) -> Any:
    config = json.loads((path / "config.json").read_text())
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97}
    return transformers.GPT2Config(**sizes, quantization_config=config["quantization_config"])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("format 4, this mpoc reads format 1 or 2 or 3", lambda q: q.update(format=4)),
        ("format None, this mpoc reads format 1", lambda q: q.pop("format")),
        ("no layers, or unknown keys", lambda q: q.pop("layers")),
        ("no layers, or unknown keys", lambda q: q.update(bits=4)),
        ("damaged quantization_config of 'x'", lambda q: q["layers"].update(x={})),
        ("damaged quantization_config of 'x'", lambda q: q["layers"].update(x=None)),
        ("damaged .* 'bert.*weight'", lambda q: first(q).update(bonds=[1, 2, 3])),
        ("damaged .* 'bert.*weight'", lambda q: first(q).update(kind="tensor")),
        ("damaged .* 'bert.*weight'", lambda q: first(q).update(shape=[320, 32])),
        ("damaged .* 'bert.*weight'", lambda q: first(q).update(form="ring")),
    ],
)
def test_rejects_damaged_configuration(
    make: Make, tmp_path: Path, message: str, change: Callable[[dict[str, Any]], object]
) -> None:
    path = edit(make("bert").path, tmp_path / "c", lambda config: change(config["quantization_config"]))
    with pytest.raises(MpocError, match=message):
        auto("bert", path)


def test_rejects_missing_cores(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("bert").path, tmp_path / "c")
    state = load_file(tmp_path / "c" / "model.safetensors")
    name = next(name for name in state if name.endswith("cores.1"))
    del state[name]
    save_file(state, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MpocError, match=f"tensor '{name}' is missing"):
        auto("bert", tmp_path / "c")


def test_rejects_networks_without_the_layers(make: Make) -> None:
    small = make("bert")
    with pytest.raises(MpocError, match=r"none of its .* is in a GPT2Model"):
        transformers.GPT2Model.from_pretrained(small.path, config=bert_as_gpt2(small.path))


def test_rejects_dense_directories(make: Make) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        auto("bert", make("bert").expanded, quantization_config=mpoc.hf.quantizer.MpoConfig())


@pytest.mark.parametrize("version", [None, "4.57.1", "5.12.0"])
def test_rejects_missing_or_old_transformers(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    found = ModuleType("transformers")
    vars(found)["__version__"] = version
    monkeypatch.setitem(sys.modules, "transformers", found if version else None)
    with pytest.raises(ImportError, match=r"5\.23 or later .*: pip install 'mpoc\[hf\]'"):
        runpy.run_path(str(mpoc.hf.quantizer.__file__))


@pytest.mark.parametrize("part", ["", "bert"])
def test_rejects_saving_unknown_cores(make: Make, tmp_path: Path, part: str) -> None:
    loaded, compressed = mpoc.load(make("bert").path, tiny("bert")), tiny("bert")
    mpoc.compress(compressed, bond=4)
    for model in (loaded, compressed, copy.deepcopy(compressed)):
        saved: Any = model.get_submodule(part)
        with pytest.raises(MpocError, match="save_pretrained cannot save a network that mpoc"):
            saved.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
