"""Files that say which network their tensors belong to, from compress to load and export."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.architecture import make_network
from mpoc.models.export import export_network
from mpoc.models.loading import open_model
from mpoc.models.zoo import example, make
from mpoc.reporting.summary import report_dict, summary
from tests.support.architectures import tiny
from tests.support.marks import slow_except

NET = """from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 16)  # by its name a linear map
        self.embed = nn.Linear(16, 60, bias=False)  # by its name an embedding

    def forward(self, x):
        return self.embed(self.table(x))

number = 3
"""
MLP = """from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
"""


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_net.py").write_text(NET)
    (tmp_path / "zoo_mlp.py").write_text(MLP)
    monkeypatch.chdir(tmp_path)


def saved(arch: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network that ``arch`` names, its state in ``m.pt``."""
    network = make_network(arch).to(dtype).eval()
    torch.save(network.state_dict(), "m.pt")
    return network


def compressed(arch: str | None, **options: Any) -> Path:
    """``m.pt``, compressed."""
    output = Path("m.mpo.safetensors")
    recipe = make_recipe(None, {"bond": 4} | options)
    compress_checkpoint(Path("m.pt"), output, recipe, force=True, arch=arch)
    return output


WRAPPER = """from torch import nn

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.module = nn.Linear(48, 64)

    def forward(self, x):
        return self.body.module(x)
"""


def test_network_decides_what_is_a_wrapper(tmp_path: Path) -> None:
    """Without it ``body.module.weight`` is taken for a weight below DataParallel."""
    (tmp_path / "zoo_wrapper.py").write_text(WRAPPER)
    network = saved("zoo_wrapper:Parallel")
    assert [layer.name for layer in read_manifest(compressed(None)).layers] == ["body.weight"]
    output = compressed("zoo_wrapper:Parallel")
    assert [layer.name for layer in read_manifest(output).layers] == ["body.module.weight"]
    assert mpoc.load(output, copy.deepcopy(network))(torch.ones(2, 48)).shape == (2, 64)
    model = open_model(Path("m.pt"), "zoo_wrapper:Parallel")
    assert torch.equal(model.network(torch.ones(2, 48)), network(torch.ones(2, 48)))


ZOO = ["fc2", "resnet:depth=20", "densenet:depth=7", "picogpt:vocab=30,context=8"]


@pytest.mark.parametrize("spec", slow_except(ZOO, "fc2", "densenet:depth=7"))
def test_zoo_network_loads_from_its_file_alone(spec: str) -> None:
    network = saved(spec)
    path = compressed(spec)
    assert read_manifest(path).architecture == {"zoo": spec}
    state = torch.random.get_rng_state()
    loaded = mpoc.load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (type(loaded), loaded.training) == (type(network), False)
    x = example(spec)
    with torch.no_grad():
        assert torch.equal(loaded(x), mpoc.load(path, copy.deepcopy(network))(x))
        assert not torch.equal(loaded(x + 1), network(x + 1))


def test_files_record_the_long_form_of_a_short_name() -> None:
    saved("resnet:depth=20")
    path = compressed("resnet20")
    assert read_manifest(path).architecture == {"zoo": "resnet:depth=20"}
    assert type(mpoc.load(path)) is type(make("resnet20"))


def test_names_with_a_hyphen_are_of_the_zoo() -> None:
    assert type(make_network("mera-cnn:hidden=16")) is type(make("mera-cnn:hidden=16"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_uses_the_dtype_of_the_file(dtype: torch.dtype) -> None:
    saved("fc2", dtype)
    loaded = mpoc.load(compressed("fc2"))
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}


def test_infers_kinds_from_modules() -> None:
    saved("zoo_net.py:Net")
    by_name, by_module = (read_manifest(compressed(arch)) for arch in (None, "zoo_net.py:Net"))
    assert [(layer.name, layer.kind) for layer in by_name.layers] == [("table.weight", "linear")]
    assert [(layer.name, layer.kind) for layer in by_module.layers] == [("embed.weight", "linear")]
    assert (by_name.kinds_from, by_module.kinds_from) == ("names and shapes", "the model's modules")
    assert (by_name.architecture, by_module.architecture) == ({}, {"factory": "zoo_net.py:Net"})


def test_accepts_wrapper_prefixes_and_old_checkpoints() -> None:
    network = make("resnet:depth=8")
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": kept}, "m.pt")
    loaded, x = mpoc.load(compressed("resnet:depth=8", exclude=("conv1",))), torch.randn(1, 3, 32, 32)
    assert loaded(x).isfinite().all()
    assert torch.equal(loaded.state_dict()["conv1.weight"], network.state_dict()["conv1.weight"])


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("arch", "said"),
        [
            ("resnet:depth=14", "tensor 'layer1.1.conv1.weight' is only in the network"),
            ("resnet:depth=8,width=2", "tensor 'layer1.0.conv1.weight' is (16, 16, 3, 3) in the checkpoint, "
             "(32, 16, 3, 3) in the network"),
            ("fc2", "tensor 'fc1.weight' is only in the network, tensor 'conv1.weight' is only in the ch"),
            ("zoo_mlp.py:mlp", "tensor '0.weight' is only in the network"),
        ],
    )  # fmt: skip
    def test_rejects_another_network_before_any_work(self, arch: str, said: str) -> None:
        saved("resnet:depth=8")
        with pytest.raises(UsageError, match=re.escape(f"m.pt: does not fit --arch {arch}: {said}")):
            compressed(arch)
        assert not Path("m.mpo.safetensors").exists()

    @pytest.mark.parametrize(
        ("arch", "said"),
        [
            ("resnt", "--arch 'resnt': no network 'resnt' in the zoo (densenet, fc2, "),
            ("resnet:depth=9", "--arch 'resnet:depth=9': resnet: depth=9: 6n + 2"),
            ("resnet:dept=8", "did you mean 'depth'?"),
            ("resnet:8", "No module named 'resnet'"),
            ("zoo_net.py:number", "zoo_net.py has no 'number' to call"),
            ("zoo_net.py", "not of the form package.module:factory or file.py:factory"),
        ],
    )
    def test_rejects_specs_without_a_network(self, arch: str, said: str) -> None:
        saved("resnet:depth=8")
        with pytest.raises(UsageError, match=re.escape(said)):
            compressed(arch)
        with pytest.raises(UsageError, match=re.escape(said)):
            make_network(arch)

    def test_explains_zoo_names_mistaken_for_modules(self) -> None:
        with pytest.raises(UsageError) as caught:
            make_network("resnet:8")
        assert (
            caught.value.hint
            == "for the network of the zoo, --arch resnet, with options as in resnet:depth=56"
        )


def test_tensors_that_the_network_does_not_have_are_kept() -> None:
    network = make_network("zoo_mlp.py:mlp").eval()
    more = {"similarity_weight": torch.ones(1), "2.more.weight": torch.randn(64, 64)}
    torch.save(network.state_dict() | more, "m.pt")
    done = compress_checkpoint(
        Path("m.pt"), Path("m.mpo.safetensors"), make_recipe(None, {"bond": 4}), arch="zoo_mlp.py:mlp"
    )
    assert "not in the network, kept unchanged: similarity_weight, 2.more.weight" in done.notes
    kept = load_file("m.mpo.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in more.items())
    x = torch.randn(3, 48)
    loaded = mpoc.load("m.mpo.safetensors", make_network("zoo_mlp.py:mlp"), weights="cores")
    assert loaded(x).shape == (3, 32) and ".cores." in " ".join(loaded.state_dict())
    (note,) = open_model(Path("m.mpo.safetensors"), "zoo_mlp.py:mlp").notes
    assert note == "not in the network, kept unchanged: 2.more.weight, similarity_weight"


class TestLoadingWithoutAModel:
    def test_inspection_does_not_run_the_factory(self) -> None:
        saved("zoo_mlp.py:mlp")
        path = compressed("zoo_mlp.py:mlp")
        Path("zoo_mlp.py").write_text("raise SystemExit('ran')\n")
        with pytest.raises(UsageError, match=r"made by zoo_mlp\.py:mlp, which is code") as caught:
            mpoc.load(path)
        line = 'from zoo_mlp import mlp; mpoc.load("m.mpo.safetensors", mlp())'
        assert caught.value.hint == f"{line}; or --arch zoo_mlp.py:mlp"

    def test_rejects_files_without_architecture(self) -> None:
        saved("zoo_mlp.py:mlp")
        with pytest.raises(UsageError, match="holds tensors, not the network's code") as caught:
            mpoc.load(compressed(None))
        assert 'mpoc.load("m.mpo.safetensors", model)' in (caught.value.hint or "")

    def test_reads_a_hugging_face_directory(self) -> None:
        tiny("bert").save_pretrained("model")
        recipe = make_recipe(None, {"bond": 4, "embeddings": True, "allow_growth": True})
        compress_checkpoint(Path("model"), Path("model-mpo"), recipe)
        loaded: Any = mpoc.load("model-mpo")
        assert (type(loaded).__name__, loaded.training) == ("BertForMaskedLM", False)
        assert any(".cores." in name for name in loaded.state_dict())

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("fc3", "its network is not in the zoo: no network 'fc3' in the zoo"),
            ("resnet:depth=21", "its network is not in the zoo: resnet: depth=21"),
            ("lenet5", "does not fit this LeNet5: "),
            ("resnet:depth=20,width=99999", "does not fit this ResNet: "),  # and takes no memory
        ],
    )
    def test_rejects_a_conflicting_architecture(self, spec: str, said: str) -> None:
        saved("fc2")
        path = compressed("fc2")
        with safe_open(path, "pt") as file:
            value = json.loads(file.metadata()["mpoc"])
        value["architecture"] = {"zoo": spec}
        save_file(load_file(path), path, {"format": "pt", "mpoc": json.dumps(value)})
        with pytest.raises(MpocError, match=re.escape(said)):
            mpoc.load(path)


def test_report_names_the_architecture() -> None:
    saved("fc2")

    def said(manifest: Manifest) -> list[str]:
        return [line for line in summary(manifest, 1, False) if line.startswith("architecture")]

    named, told = (read_manifest(compressed(arch)) for arch in ("fc2", None))
    assert said(named) == said(told) == ["architecture fc2 (zoo)"]
    assert report_dict(told, 1)["architecture"] == {"zoo": "fc2"}
    saved("zoo_mlp.py:mlp")
    without, by_code = (read_manifest(compressed(arch)) for arch in (None, "zoo_mlp.py:mlp"))
    assert said(without) == []
    assert said(by_code) == ["architecture zoo_mlp.py:mlp (your code: pass --arch again)"]


@pytest.mark.slow
class TestExport:
    @pytest.mark.parametrize("spec", ["fc2", "picogpt:vocab=30,context=8"])
    def test_zoo_network_needs_no_options(self, spec: str) -> None:
        saved(spec)
        (taken,) = export_network(compressed(spec), {"pt2": Path("p.pt2")}, []).inputs
        x = torch.cat([example(spec)] * 3)
        assert (taken.shape, taken.dtype) == (tuple(x[:1].shape), x.dtype)
        program = torch.export.load("p.pt2").module()
        with torch.no_grad():
            expected = mpoc.load("m.mpo.safetensors")(x)
        torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-5)

    def test_file_without_architecture_accepts_a_spec(self) -> None:
        saved("fc2")
        (taken,) = export_network(compressed(None), {"pt2": Path("p.pt2")}, [], "fc2").inputs
        assert taken.shape == (1, 1, 28, 28)
        with pytest.raises(UsageError, match="no network 'fc3'"):
            export_network(Path("m.mpo.safetensors"), {"pt2": Path("q.pt2")}, [], "fc3")
