"""A network compressed in memory, saved, is the file that compressing its checkpoint writes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_writer import replace_metadata
from mpoc.io.training_history import Measured
from mpoc.models import zoo
from mpoc.models.loading import open_model
from mpoc.tensor_networks.factors import parse_order
from tests.models.test_loading import LOSSY, Tied, mlp
from tests.nn.layers import NETWORKS
from tests.support.sums import compress_to_sums

FORMS: dict[str, dict[str, Any]] = {
    "mpo": {"bond": 3},
    "svd": {"bond": 3, "form": "svd"},
    "tree": {"bond": 2, "form": "tree"},
    "mera": {"bond": 2, "form": "mera"},
    "ordered": {"bond": 3, "order": "learned"},
    "ratio": {"ratio": 0.5, "allow_growth": False},
}


def answers(network: nn.Module, x: Any) -> torch.Tensor:
    with torch.no_grad():
        y = network.eval()(x)
    return y[0] if isinstance(y, tuple) else y


def saved(network: nn.Module, folder: Path, **options: Any) -> Path:
    mpoc.compress(network, **(LOSSY | {"bond": None} | options))
    mpoc.save(network, folder / "memory.mpo.safetensors", force=True)
    return folder / "memory.mpo.safetensors"


def stored(path: Path, **options: Any) -> Path:
    """The file that ``mpoc compress`` writes of a checkpoint."""
    output = path.with_name("file.mpo.safetensors")
    options = {key: (parse_order(value),) if key == "order" else value for key, value in options.items()}
    compress_checkpoint(path, output, make_recipe(None, LOSSY | {"bond": None} | options), force=True)
    return output


@pytest.mark.parametrize("kind", NETWORKS)
class TestEveryKind:
    def test_loads_as_it_was_saved(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        fresh = copy.deepcopy(network)
        for value in fresh.state_dict().values():
            value.zero_()
        path = saved(network, tmp_path, bond=3)
        loaded = mpoc.load(path, fresh)
        torch.testing.assert_close(answers(loaded, x), answers(network, x), rtol=1e-6, atol=1e-6)
        for name, value in network.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name

    def test_saved_again_it_is_the_same_file(self, kind: str, tmp_path: Path) -> None:
        network, _ = NETWORKS[kind]()
        fresh = copy.deepcopy(network)
        path = saved(network, tmp_path, bond=3)
        again = tmp_path / "again.safetensors"
        report = mpoc.save(mpoc.load(path, fresh), again)
        assert again.read_bytes() == path.read_bytes()
        assert repr(report) == repr(mpoc.read_report(path))

    def test_expands_to_the_dense_tensors(self, kind: str, tmp_path: Path) -> None:
        network, _ = NETWORKS[kind]()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        path = saved(network, tmp_path, bond=10**6)
        mpoc.expand_checkpoint(path, tmp_path / "dense.safetensors")
        dense = load_file(tmp_path / "dense.safetensors")
        assert dense.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(dense[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_is_the_file_of_the_command(form: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 32))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    options = FORMS[form]
    path = stored(tmp_path / "m.pt", **options)
    own = saved(network, tmp_path, **options)
    expected, found = read_manifest(path), read_manifest(own)
    assert found.layers == expected.layers
    assert found.source.fingerprint == expected.source.fingerprint
    assert (found.rho_selected, found.num_parameters) == (expected.rho_selected, expected.num_parameters)
    assert (found.vectors, found.left_alone, found.options) == (
        expected.vectors,
        expected.left_alone,
        expected.options,
    )
    one, other = load_file(path), load_file(own)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", ["linear, padded", "lstm", "embedding"])
def test_a_low_rank_part_stays(kind: str, tmp_path: Path) -> None:
    network, _ = NETWORKS[kind]()
    torch.save(network.state_dict(), tmp_path / "m.pt")
    path, again = tmp_path / "m.mpo.safetensors", tmp_path / "again.safetensors"
    compress_to_sums(tmp_path / "m.pt", path, embeddings=True)
    loaded = mpoc.load(path, network)
    mpoc.save(loaded, again)
    assert without_names(read_manifest(again)) == without_names(read_manifest(path))
    del vars(loaded)["_mpoc_origin"]
    mpoc.save(loaded, again, force=True)  # nothing is known of the layers but their cores
    found, expected = read_manifest(again).layers, read_manifest(path).layers
    assert [(layer.form, layer.structure, layer.bonds, layer.low_rank) for layer in found] == [
        (layer.form, layer.structure, layer.bonds, layer.low_rank) for layer in expected
    ]


def without_names(manifest: Manifest) -> Manifest:
    return replace(manifest, source=replace(manifest.source, name=None, nbytes=None))


def test_a_whole_map(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))

    network, x = make(), torch.randn(2, 4, 8, 8)
    path = saved(network, tmp_path, bond=4, conv="map", input_shape=(1, 4, 8, 8))
    assert [layer.kind for layer in read_manifest(path).layers] == ["convmap", "linear"]
    loaded = mpoc.load(path, make())
    torch.testing.assert_close(answers(loaded, x), answers(network, x))


@pytest.mark.parametrize("embeddings", [True, False])
def test_tied_weights_stay_tied(embeddings: bool, tmp_path: Path) -> None:
    network, x = Tied(), torch.tensor([0, 59])
    path = saved(network, tmp_path, bond=3, embeddings=embeddings)
    assert read_manifest(path).tied == {"head.weight": "embed.weight"}
    names = set(load_file(path))
    assert not [name for name in names if name.startswith("head")]
    loaded: Any = mpoc.load(path, Tied())
    torch.testing.assert_close(answers(loaded, x), answers(network, x))
    assert embeddings == (loaded.head.weight is not loaded.embed.weight)
    mpoc.expand_checkpoint(path, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert torch.equal(dense["head.weight"], dense["embed.weight"])


def test_one_module_in_two_places(tmp_path: Path) -> None:
    layer = nn.Linear(32, 32)
    path = saved(nn.Sequential(layer, layer), tmp_path, bond=2)
    assert read_manifest(path).tied == {"1.weight": "0.weight", "1.bias": "0.bias"}
    other = nn.Linear(32, 32)
    x = torch.randn(3, 32)
    loaded = mpoc.load(path, nn.Sequential(other, other))
    torch.testing.assert_close(answers(loaded, x), layer(layer(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_buffers(dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> nn.Module:
        network = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        network.register_buffer("scale", torch.tensor(3.0))
        network.register_buffer("scratch", torch.zeros(5), persistent=False)
        return network.to(dtype)

    network = make()
    network(torch.randn(8, 48, dtype=dtype))
    path = saved(network, tmp_path, bond=3)
    stored = load_file(path)
    assert stored.keys() == network.state_dict().keys()
    assert stored["1.num_batches_tracked"] == 1
    assert {value.dtype for value in stored.values()} == {dtype, torch.int64}
    loaded = mpoc.load(path, make(), weights="cores")
    x = torch.randn(8, 48, dtype=dtype)
    assert torch.equal(answers(loaded, x), answers(network, x))


def test_a_change_of_dtype_is_recorded(tmp_path: Path) -> None:
    network = mlp()
    mpoc.compress(network, bond=3, allow_growth=True)
    network.to(torch.bfloat16)
    report = mpoc.save(network, tmp_path / "m.safetensors")
    assert {(layer.dtype, layer.stored_dtype) for layer in report.layers} == {("bfloat16", "bfloat16")}
    assert [layer.relative_error for layer in report.layers] == [None, None]
    mpoc.load(tmp_path / "m.safetensors", mlp(torch.bfloat16))
    mpoc.expand_checkpoint(tmp_path / "m.safetensors", tmp_path / "dense.safetensors")


def test_narrower_cores_of_a_file_stay_narrow(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    path = stored(tmp_path / "m.pt", bond=3, dtype="bfloat16")
    mpoc.save(mpoc.load(path, mlp()), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_errors_of_trained_cores_are_not_known(tmp_path: Path) -> None:
    network = mlp()
    before = mpoc.compress(network, bond=3, allow_growth=True)
    with torch.no_grad():
        network.get_submodule("2.cores").get_parameter("0").mul_(1.5)
    after = mpoc.save(network, tmp_path / "m.safetensors")
    assert after.layers[0] == before.layers[0]
    assert after.layers[1].relative_error is None
    assert len(after.layers[1].entropies) == len(before.layers[1].entropies)


def test_what_was_measured_of_a_network_is_dropped_once_it_is_trained(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    path = stored(tmp_path / "m.pt", bond=3)
    whole = read_manifest(path)
    likeness = {"samples": 4, "likeness": {"this": {"cosine": 0.9}}}
    layers = tuple(replace(layer, held_out_error=0.1, same_size={"this": 0.1}) for layer in whole.layers)
    measured = Measured(metric="loss", before={"loss": 1.0}, after={"loss": 1.1})
    known = replace(whole, layers=layers, calibration=likeness, measured=measured)
    replace_metadata(path, {"mpoc": known.to_json()})
    network = mpoc.load(path, mlp())
    mpoc.save(network, tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == path.read_bytes()
    with torch.no_grad():
        network.get_submodule("0.cores").get_parameter("0").mul_(1.5)
    mpoc.save(network, tmp_path / "trained.safetensors")
    trained = read_manifest(tmp_path / "trained.safetensors")
    assert (trained.measured, trained.calibration) == ({}, {"samples": 4})
    assert (trained.layers[0].held_out_error, trained.layers[0].same_size) == (None, None)
    assert trained.layers[1:] == layers[1:]


def test_parts_compressed_one_after_another(tmp_path: Path) -> None:
    network = nn.Sequential(mlp(), nn.Linear(12, 8))
    inner = mpoc.compress(network[0], bond=3, allow_growth=True)
    outer = mpoc.compress(network, bond=2, layers="1", allow_growth=True)
    report = mpoc.save(network, tmp_path / "m.safetensors")
    assert [layer.name for layer in report.layers] == ["0.0.weight", "0.2.weight", "1.weight"]
    expected = [layer.relative_error for layer in (*inner.layers, *outer.layers)]
    assert [layer.relative_error for layer in report.layers] == expected
    x = torch.randn(3, 24)
    loaded = mpoc.load(tmp_path / "m.safetensors", nn.Sequential(mlp(), nn.Linear(12, 8)))
    torch.testing.assert_close(answers(loaded, x), answers(network, x))


def test_a_layer_left_dense_keeps_its_reason(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 3))
    report = mpoc.compress(network, bond=4)
    saved_report = mpoc.save(network, tmp_path / "m.safetensors")
    assert "would not shrink" in report.layers[1].reason
    assert saved_report.layers == report.layers


def test_a_copy_saves_the_same(tmp_path: Path) -> None:
    network = mlp()
    path = saved(network, tmp_path, bond=3)
    mpoc.save(copy.deepcopy(network), tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == path.read_bytes()
    torch.save(network, tmp_path / "whole.pt")
    mpoc.save(torch.load(tmp_path / "whole.pt", weights_only=False), tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == path.read_bytes()


def test_opens_for_training_with_its_network(tmp_path: Path) -> None:
    network = zoo.make("lenet5")
    path = saved(network, tmp_path, bond=4, allow_growth=False)
    model = open_model(path, "lenet5")
    x = zoo.example("lenet5")
    assert torch.equal(answers(model.network, x), answers(network, x))
    assert model.manifest == read_manifest(path)


class TestErrors:
    def test_a_network_without_compressed_layers(self, tmp_path: Path) -> None:
        with pytest.raises(MpocError, match="no layer of this Sequential is compressed") as caught:
            mpoc.save(mlp(), tmp_path / "m.safetensors")
        assert "mpoc.compress" in (caught.value.hint or "")
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_file_needs_force(self, tmp_path: Path) -> None:
        network = mlp()
        path = saved(network, tmp_path, bond=3)
        with pytest.raises(UsageError, match="exists already") as caught:
            mpoc.save(network, path)
        assert caught.value.hint == "force=True replaces it"

    def test_another_ending_is_refused(self, tmp_path: Path) -> None:
        network = mlp()
        saved(network, tmp_path, bond=3)
        with pytest.raises(UsageError, match=r"must end in \.safetensors"):
            mpoc.save(network, tmp_path / "m.pt")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        network = mlp()
        saved(network, tmp_path, bond=3)
        with pytest.raises(MpocError, match="there is no directory"):
            mpoc.save(network, tmp_path / "no" / "m.safetensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda network: network.to("meta"), "is on the meta device"),
            (
                lambda network: network.register_buffer("z", torch.zeros(2, dtype=torch.complex128)),
                "'z' has dtype torch.complex128",
            ),
        ],
    )
    def test_tensors_that_no_file_can_hold(self, change: Any, message: str, tmp_path: Path) -> None:
        network = mlp()
        mpoc.compress(network, bond=3, allow_growth=True)
        change(network)
        with pytest.raises(MpocError, match=message):
            mpoc.save(network, tmp_path / "m.safetensors")
