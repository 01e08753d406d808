from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpoc
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.loading import open_model
from mpoc.models.zoo.cifar import resnet
from mpoc.nn import MPOEmbedding, MPOLinear, use_weights
from mpoc.nn.weight import Weights
from tests.nn.layers import NETWORKS, gradients, named, pulled_back
from tests.support.checkpoints import save_directory

LOSSY: dict[str, Any] = {"bond": 3, "embeddings": True, "allow_growth": True}


def compressed(network: nn.Module, folder: Path, **options: Any) -> Path:
    """The network's state, compressed to a file."""
    torch.save(network.state_dict(), folder / "m.pt")
    output = folder / "m.mpo.safetensors"
    compress_checkpoint(folder / "m.pt", output, make_recipe(None, LOSSY | options), force=True)
    return output


def expanded(path: Path, network: nn.Module) -> nn.Module:
    """``network`` with the dense weights that ``mpoc expand`` makes."""
    dense = path.with_name("dense.safetensors")
    expand_checkpoint(path, dense, force=True)
    network.load_state_dict(load_file(dense), strict=True)
    return network


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """24 → 18 → 12."""
    return nn.Sequential(nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 12)).to(dtype)


def with_a_buffer() -> nn.Sequential:
    """Its second weight is no parameter."""
    network = mlp()
    weight = network.get_parameter("2.weight").detach()
    del network[2].weight
    network[2].register_buffer("weight", weight)
    return network


class Tied(nn.Module):
    """An embedding and a head of one weight, or of two."""

    embed: Any
    head: Any

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 60, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.middle(self.embed(indices))))
        return y


@pytest.mark.parametrize("kind", NETWORKS)
class TestEveryKind:
    def test_computes_like_the_expanded_network(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        fresh = copy.deepcopy(network)
        path = compressed(network, tmp_path)
        dense = expanded(path, copy.deepcopy(network))
        manifest = read_manifest(path)
        assert manifest.replaced
        assert max(layer.relative_error or 0 for layer in manifest.replaced) > 1e-3
        for parameter in fresh.parameters():
            nn.init.normal_(parameter)
        loaded = mpoc.load(path, fresh)
        assert loaded is fresh
        expected, found = gradients(dense, x), gradients(loaded, x)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
        for layer in manifest.replaced:
            names = [layer.core_name(k) for k in range(len(layer.output_factors))]
            cores = [loaded.get_parameter(name) for name in names]
            wanted = pulled_back(cores, layer.structure, expected[1].pop(layer.name))
            got = [found[1].pop(name) for name in names]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)  # biases, norms

    def test_state_has_the_names_of_the_file(self, kind: str, tmp_path: Path) -> None:
        network, _ = NETWORKS[kind]()
        path = compressed(network, tmp_path)
        loaded = mpoc.load(path, copy.deepcopy(network))
        with safe_open(path, "pt") as file:
            assert set(loaded.state_dict()) == set(file.keys())
            for name, value in loaded.state_dict().items():
                assert torch.equal(value, file.get_tensor(name)), name

    def test_state_dict_round_trip(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        path = compressed(network, tmp_path)
        first = mpoc.load(path, copy.deepcopy(network)).eval()
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.mul_(1.01)
        torch.save(first.state_dict(), tmp_path / "tuned.pt")
        second = mpoc.load(path, copy.deepcopy(network)).eval()
        second.load_state_dict(torch.load(tmp_path / "tuned.pt", weights_only=True), strict=True)
        with torch.no_grad():
            assert torch.equal(second(x), first(x))
            assert torch.equal(copy.deepcopy(first)(x), first(x))


@pytest.mark.parametrize("kind", NETWORKS)
class TestWeights:
    """What a loaded network computes from, in eval mode."""

    def test_all_give_the_same(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        path = compressed(network, tmp_path)
        through_cores = mpoc.load(path, copy.deepcopy(network).eval(), weights="cores")
        with torch.no_grad():
            expected = through_cores(x)
            for weights in get_args(Weights):
                loaded = mpoc.load(path, copy.deepcopy(network), weights=weights).eval()
                torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
                assert bool(held(loaded)) == (weights != "cores")
                assert loaded.state_dict().keys() == through_cores.state_dict().keys()
                twins = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
                for twin in twins:
                    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)

    def test_dense_weights_are_built_once_and_follow_the_cores(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        loaded = mpoc.load(compressed(network, tmp_path), network.eval(), weights="dense")
        assert held(loaded)
        twin = copy.deepcopy(loaded)
        use_weights(twin, "cores")
        optimiser = torch.optim.SGD(loaded.parameters(), lr=0.01)
        with torch.no_grad():
            loaded(x)
            before = held(loaded)
            loaded(x)
            assert all(value is before[name] for name, value in held(loaded).items())
        assert not held(loaded.train())
        loaded(x).square().sum().backward()
        optimiser.step()
        for state in (loaded.state_dict(), {n: v * 1.1 for n, v in loaded.state_dict().items()}):
            loaded.eval().load_state_dict(state)
            twin.load_state_dict(state)
            with torch.no_grad():
                torch.testing.assert_close(loaded(x), twin(x), rtol=1e-5, atol=1e-5)
        wide = loaded.double()
        x = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            torch.testing.assert_close(wide(x), twin.double()(x), rtol=1e-5, atol=1e-5)


def held(network: nn.Module) -> dict[str, Tensor]:
    """The dense weights that the network's modules hold."""
    return {
        f"{path}.{name}": value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if name.endswith("_held")
    }


@pytest.mark.slow
@pytest.mark.parametrize("weights", get_args(Weights))
def test_compiles_with_any_weights(weights: Weights, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 8)
        )

    path = compressed(make(), tmp_path)
    loaded = mpoc.load(path, make(), weights=weights).eval()
    program = torch.compile(loaded, backend="eager", fullgraph=True)
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(program(x), loaded(x))
        for core in loaded.get_submodule("2.cores").parameters():
            core.mul_(1.1)
        loaded.eval()
        torch.testing.assert_close(program(x), loaded(x))
    exported = torch.export.export(loaded, (x,))
    torch.testing.assert_close(exported.module()(x), loaded(x))
    assert not exported.constants  # cores alone


def test_an_unknown_kind_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights='sparse': not one of auto, dense, cores"):
        mpoc.load(tmp_path / "none.safetensors", mlp(), weights="sparse")  # type: ignore[arg-type]


class TestTiedWeights:
    def test_tied_layers_share_cores(self, tmp_path: Path) -> None:
        path = compressed(Tied(), tmp_path)
        loaded = mpoc.load(path, Tied())
        assert isinstance(loaded, Tied)
        assert type(loaded.embed) is MPOEmbedding
        assert type(loaded.head) is MPOLinear
        pairs = zip(loaded.embed.cores, loaded.head.cores, strict=True)
        assert all(one is other for one, other in pairs)
        dense, x = expanded(path, Tied()), torch.tensor([0, 59])
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("embeddings", [True, False])
    def test_handles_untied_models(self, tmp_path: Path, embeddings: bool) -> None:
        path = compressed(Tied(), tmp_path, embeddings=embeddings)
        loaded = mpoc.load(path, Tied(tied=False))
        dense, x = expanded(path, Tied(tied=False)), torch.tensor([0, 59])
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)

    def test_handles_untied_files(self, tmp_path: Path) -> None:
        network = Tied(tied=False)
        path = compressed(network, tmp_path, embeddings=False)
        assert [layer.name for layer in read_manifest(path).replaced] == ["middle.weight", "head.weight"]
        loaded = mpoc.load(path, Tied())  # the file decides
        dense, x = expanded(path, Tied(tied=False)), torch.tensor([0, 59])
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)
        path = compressed(network, tmp_path)
        loaded = mpoc.load(path, Tied())
        dense = expanded(path, Tied(tied=False))
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)

    def test_handles_untied_dense_tensors(self, tmp_path: Path) -> None:
        path = compressed(Tied(tied=False), tmp_path, embeddings=False, exclude=("head",))
        loaded: Any = mpoc.load(path, Tied())
        dense, x = expanded(path, Tied(tied=False)), torch.tensor([0, 59])
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)
        assert loaded.head.weight is not loaded.embed.weight
        tied: Any = mpoc.load(compressed(Tied(), tmp_path, embeddings=False, exclude=("head",)), Tied())
        assert tied.head.weight is tied.embed.weight

    def test_rejects_two_layers_for_one_module(self, tmp_path: Path) -> None:
        network = nn.Sequential(nn.Linear(24, 24), nn.Linear(16, 16), nn.Linear(16, 16))
        path = compressed(network, tmp_path, exclude=("1", "2"))
        layer = nn.Linear(16, 16)
        model = nn.Sequential(nn.Linear(24, 24), layer, layer)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(MpocError, match=r"'2\.\w+' and '1\.\w+' differ in the file"):
            mpoc.load(path, model)
        torch.testing.assert_close(model.state_dict(), before)

    def test_handles_a_module_in_two_places(self, tmp_path: Path) -> None:
        def network() -> nn.Module:
            layer = nn.Linear(16, 16)
            return nn.Sequential(layer, nn.ReLU(), layer)

        path = compressed(network(), tmp_path)
        loaded, dense = mpoc.load(path, network()), expanded(path, network())
        x = torch.randn(3, 16)
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)
        assert loaded.get_submodule("0") is loaded.get_submodule("2")


class TestWhatStays:
    def test_keeps_hooks_mode_and_frozen_parameters(self, tmp_path: Path) -> None:
        path = compressed(mlp(), tmp_path)
        model = mlp().eval()
        seen: list[int] = []
        model[0].register_forward_hook(lambda *_: seen.append(1))
        model[0].requires_grad_(False)
        layers = list(model)
        mpoc.load(path, model)
        model(torch.randn(2, 24))
        assert seen == [1]
        assert not model.training
        assert list(model) == layers
        assert {p.requires_grad for p in model[0].parameters()} == {False}
        assert {p.requires_grad for p in model[2].parameters()} == {True}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        path = compressed(mlp(dtype), tmp_path)
        loaded, dense = mpoc.load(path, mlp(dtype)), expanded(path, mlp(dtype))
        assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
        assert {layer.stored_dtype for layer in read_manifest(path).replaced} == {str(dtype).split(".")[1]}
        x = torch.randn(5, 24, dtype=dtype)
        near = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(loaded(x), dense(x), rtol=near, atol=near)

    def test_converts_cores_to_the_dtype_of_the_weight(self, tmp_path: Path) -> None:
        path = compressed(mlp(), tmp_path, dtype="bfloat16")
        loaded, dense = mpoc.load(path, mlp()), expanded(path, mlp())
        assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
        x = torch.randn(5, 24)
        torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)

    def test_buffers_and_dense_layers_are_loaded(self, tmp_path: Path) -> None:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        network(torch.randn(4, 3, 3, 3))  # moves the statistics
        path = compressed(network, tmp_path, exclude=("0",))
        loaded = mpoc.load(path, copy.deepcopy(network).apply(forget))
        state = loaded.state_dict()
        assert int(state["1.num_batches_tracked"]) == 1
        assert torch.equal(state["1.running_mean"], network.state_dict()["1.running_mean"])
        assert torch.equal(state["0.weight"], network.state_dict()["0.weight"])
        assert type(loaded[0]) is nn.Conv2d  # type: ignore[index]

    def test_does_not_keep_the_file_open(self, tmp_path: Path) -> None:
        path = compressed(mlp(), tmp_path)
        loaded = mpoc.load(path, mlp())
        before = loaded(torch.ones(24))
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert torch.equal(loaded(torch.ones(24)), before)


def forget(module: nn.Module) -> None:
    """Make everything in a module wrong."""
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        nn.init.constant_(value, 7)


class TestErrors:
    """Each says both sides, and leaves the model as it was."""

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            (
                lambda: nn.Sequential(*mlp(), nn.Linear(12, 2)),
                r"does not fit this Sequential: 2 tensors only in the model \(3\.weight, 3\.bias\)$",
            ),
            (
                lambda: mlp()[:1],
                r"does not fit this Sequential: 2 tensors only in the file \(2\.(weight|bias), 2\.",
            ),
            (
                lambda: nn.Sequential(nn.Linear(24, 18), nn.Linear(18, 12)),
                r"2 tensors only in the model \(1\.weight, 1\.bias\); 2 tensors only in the file \(2\.",
            ),
            (
                lambda: nn.Sequential(nn.Linear(24, 18, bias=False), nn.ReLU(), nn.Linear(18, 12)),
                r"1 tensors only in the file \(0\.bias\)",
            ),
            (
                lambda: nn.Sequential(nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 10)),
                r"tensor '2\.(weight|bias)' is \(12.* in the file, \(10.* in the model",
            ),
            (
                lambda: nn.Sequential(nn.Linear(20, 18), nn.ReLU(), nn.Linear(18, 12)),
                r"tensor '0\.weight' is \(18, 24\) float32 in the file, \(18, 20\) float32 in the model",
            ),
            (lambda: mlp(torch.float16), r"is \(.*\) float32 in the file, \(.*\) float16 in the model"),
            (
                with_a_buffer,
                r"tensor '2\.weight' is compressed .* and a buffer in the model: cores",
            ),
            (lambda: mlp().to("meta"), r"tensor '0\.weight' of the model is on the meta device"),
        ],
        ids=[
            "missing",
            "surplus",
            "other names",
            "bias",
            "shape",
            "shape of cores",
            "dtype",
            "buffer",
            "meta",
        ],
    )
    def test_rejects_another_model(self, tmp_path: Path, model: Any, said: str) -> None:
        path = compressed(mlp(), tmp_path)
        network = model()
        before = copy.deepcopy(network)
        with pytest.raises(MpocError, match=said) as caught:
            mpoc.load(path, network)
        assert str(caught.value).startswith(f"{path}: ")
        unchanged(network, before)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"0.cores.1": None}, r"core '0\.cores\.1' is missing"),
            ({"0.cores.1": torch.zeros(1, 2, 3, 4)}, r"core '0\.cores\.1' is \(1, 2, 3, 4\) float32"),
            ({"2.cores.0": "double"}, r"core '2\.cores\.0' is .* float64; the manifest says .* float32"),
            ({"2.bias": None}, r"1 tensors only in the model \(2\.bias\)"),
        ],
    )
    def test_rejects_damaged_files(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        path = compressed(mlp(), tmp_path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        for name, value in change.items():
            state[name] = state[name].double() if isinstance(value, str) else value
        save_file({name: value for name, value in state.items() if value is not None}, path, metadata)
        network = mlp()
        before = copy.deepcopy(network)
        with pytest.raises(MpocError, match=said):
            mpoc.load(path, network)
        unchanged(network, before)

    def test_rejects_uncompressed_files(self, tmp_path: Path) -> None:
        save_file(mlp().state_dict(), tmp_path / "m.safetensors")
        with pytest.raises(MpocError, match="not compressed by mpoc"):
            mpoc.load(tmp_path / "m.safetensors", mlp())
        with pytest.raises(MpocError, match="no such file"):
            mpoc.load(tmp_path / "absent.safetensors", mlp())

    def test_rejects_models_with_cores(self, tmp_path: Path) -> None:
        path = compressed(mlp(), tmp_path)
        loaded = mpoc.load(path, mlp())
        before = copy.deepcopy(loaded)
        with pytest.raises(MpocError, match=r"only in the model \(0\.cores\.0"):
            mpoc.load(path, loaded)
        unchanged(loaded, before)


def unchanged(network: nn.Module, before: nn.Module) -> None:
    assert [type(module) for module in network.modules()] == [type(module) for module in before.modules()]
    assert network.state_dict().keys() == before.state_dict().keys()
    for name, value in network.state_dict().items():
        assert value.is_meta or torch.equal(value, before.state_dict()[name]), name


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_a_directory(tmp_path: Path, shards: int) -> None:
    network = nn.Sequential(mlp(), named(nn.Conv2d(4, 6, 3)))
    save_directory(tmp_path / "net", network.state_dict(), shards)
    recipe = make_recipe(None, {"bond": 3, "allow_growth": True, "max_shard_size": 1000})
    compress_checkpoint(tmp_path / "net", tmp_path / "net-mpo", recipe)
    assert len(list((tmp_path / "net-mpo").glob("*.safetensors"))) > 1
    expand_checkpoint(tmp_path / "net-mpo", tmp_path / "dense")
    loaded = mpoc.load(str(tmp_path / "net-mpo"), copy.deepcopy(network))
    dense = copy.deepcopy(network)
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded[0](x), dense[0](x), rtol=0, atol=1e-5)  # type: ignore[index]


TIED = """
from torch import nn

def make():
    network = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    network[1].weight = network[0].weight
    return network
"""


@pytest.mark.parametrize("equal", [True, False])
def test_dense_values_decide_whether_weights_are_tied(tmp_path: Path, equal: bool) -> None:
    table = torch.randn(8, 4)
    state = {"0.weight": table, "1.weight": table.clone() if equal else torch.randn(8, 4)}
    torch.save(state, tmp_path / "m.pt")
    (tmp_path / "net.py").write_text(TIED)
    network = open_model(tmp_path / "m.pt", f"{tmp_path / 'net.py'}:make").network
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert (network[0].weight is network[1].weight) is equal  # type: ignore[index]


def test_loads_a_256_by_256_layer(tmp_path: Path) -> None:
    path = compressed(nn.Sequential(nn.Linear(256, 256)), tmp_path, bond=16, allow_growth=False)
    loaded = mpoc.load(path, nn.Sequential(nn.Linear(256, 256)))
    dense = expanded(path, nn.Sequential(nn.Linear(256, 256)))
    x = torch.randn(8, 256)
    torch.testing.assert_close(loaded(x), dense(x), rtol=0, atol=1e-5)
    assert sum(parameter.numel() for parameter in loaded.parameters()) < 256 * 256 / 4


def test_loads_a_residual_network(tmp_path: Path) -> None:
    network = resnet(20)
    path = compressed(network, tmp_path, bond=16, allow_growth=False)
    loaded, dense = mpoc.load(path, resnet(20)).eval(), expanded(path, resnet(20)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-5)
    kinds = {re.sub(r"^MPO", "", type(module).__name__) for module in loaded.modules()}
    assert {"Conv2d", "BatchNorm2d"} < kinds
