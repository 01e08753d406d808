from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.tensor_networks.forms.layout import from_matrix
from tests.models.test_loading import Tied, mlp, unchanged
from tests.nn.layers import NETWORKS
from tests.support.weights import as_one_matrix

FULL: dict[str, Any] = {"bond": 10**6, "allow_growth": True, "embeddings": True}


@pytest.mark.parametrize("kind", NETWORKS)
def test_full_bond_preserves_the_outputs(kind: str) -> None:
    network, x = NETWORKS[kind]()
    dense = copy.deepcopy(network).eval()
    report = mpoc.compress(network.eval(), **FULL)
    assert isinstance(report, mpoc.Report)
    assert report.manifest.kinds_from == "the model's modules"
    assert report.replaced == list(report.layers) != []
    torch.testing.assert_close(network(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"bond": 4}, {"ratio": 0.6}, {"max_error": 0.7}, {"discard": 0.2}])
def test_matches_the_command(tmp_path: Path, options: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Conv1d(16, 16, 3), nn.Linear(64, 32))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    path = tmp_path / "m.mpo.safetensors"
    done = compress_checkpoint(tmp_path / "m.pt", path, make_recipe(None, options))
    loaded = mpoc.load(path, copy.deepcopy(network))
    report = mpoc.compress(network, **options)
    assert report.layers == done.manifest.layers
    assert (report.rho, report.rho_selected) == (done.manifest.rho, done.manifest.rho_selected)
    assert report.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert network.state_dict().keys() == loaded.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_infers_kinds_from_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(60, 16)  # by its name a linear map
            self.embed = nn.Linear(16, 60)  # by its name an embedding
            self.scale = nn.Parameter(torch.ones(16, 16))

    network = Net()
    report = mpoc.compress(network, bond=3)
    assert {layer.name: layer.kind for layer in report.layers} == {"embed.weight": "linear"}
    assert type(network.table) is nn.Embedding
    assert set(report.manifest.left_alone) == {"table.weight", "scale"}
    report = mpoc.compress(network, bond=3, embeddings=True)
    assert {layer.name: layer.kind for layer in report.layers} == {"table.weight": "embedding"}


def test_skips_matrix_shaped_norms() -> None:
    network = nn.Sequential(nn.LayerNorm((32, 32)), nn.RMSNorm((32, 32)), nn.Linear(32, 32))
    report = mpoc.compress(network, bond=3)
    assert [layer.name for layer in report.layers] == ["2.weight"]
    assert report.manifest.left_alone.keys() == {"0.weight", "0.bias", "1.weight"}


def test_tied_weights_share_cores() -> None:
    network = Tied()
    x = torch.tensor([0, 59])
    before = network(x)
    report = mpoc.compress(network, **FULL)
    assert report.manifest.tied == {"head.weight": "embed.weight"}
    assert [layer.name for layer in report.layers] == ["embed.weight", "middle.weight"]
    assert all(one is other for one, other in zip(network.embed.cores, network.head.cores, strict=True))
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)


def test_handles_a_module_in_two_places() -> None:
    layer = nn.Linear(16, 16)
    network = nn.Sequential(layer, layer)
    before = network(torch.ones(16))
    mpoc.compress(network, **FULL)
    torch.testing.assert_close(network(torch.ones(16)), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    network = mlp(dtype)
    dense = copy.deepcopy(network)
    mpoc.compress(network, **FULL)
    assert {value.dtype for value in network.state_dict().values()} == {dtype}
    x = torch.randn(3, 24, dtype=dtype)
    near = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(network(x), dense(x), rtol=near, atol=near)


def test_state_dict_can_be_saved(tmp_path: Path) -> None:
    network = mlp()
    report = mpoc.compress(network, bond=3, allow_growth=True)
    save_file(network.state_dict(), tmp_path / "cores.safetensors")
    assert all(value.is_contiguous() for value in network.state_dict().values())
    assert (tmp_path / "cores.safetensors").stat().st_size < 4 * report.num_parameters + 2000


def test_compresses_a_bare_layer() -> None:
    layer = nn.Linear(24, 18)
    before = layer(torch.ones(24))
    report = mpoc.compress(layer, **FULL)
    assert report.layers[0].name == "weight"
    torch.testing.assert_close(layer(torch.ones(24)), before, rtol=1e-4, atol=1e-4)


def test_keeps_frozen_weights_frozen() -> None:
    network = mlp()
    network[0].requires_grad_(False)
    mpoc.compress(network, bond=4, allow_growth=True)
    assert {parameter.requires_grad for parameter in network[0].parameters()} == {False}
    assert {parameter.requires_grad for parameter in network[2].parameters()} == {True}


class TestErrors:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_weight_leaves_the_model_unchanged(self, value: float) -> None:
        network = mlp()
        with torch.no_grad():
            network.get_parameter("2.weight")[3, 4] = value
        before = copy.deepcopy(network)
        with pytest.raises(MpocError, match=r"tensor '2\.weight' holds (NaN|infinite values)"):
            mpoc.compress(network, bond=4)
        assert [type(module) for module in network] == [type(module) for module in before]
        torch.testing.assert_close(network.state_dict(), before.state_dict(), equal_nan=True)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "exactly one of"),
            ({"bond": 4, "ratio": 0.5}, "exactly one of"),
            ({"bond": 0}, "bond=0: .* must be positive"),
            ({"max_error": 2.0}, "max_error=2.0: must lie between 0 and 1"),
            ({"bond": 4, "conv": "maps"}, "conv='maps': not one of kernel, map"),
            ({"ratio": 1e-4}, "ratio=0.0001 cannot be reached"),
            ({"bond": 4, "exclude": "*"}, "2 matched by exclude"),
            ({"bond": 4, "layers": ["nothing*"]}, "matches no tensor"),
            ({"recipe": mpoc.Recipe(bond=4, device="cpu")}, "device is for files only"),
            ({"recipe": mpoc.Recipe(bond=4, dtype="float16")}, "dtype is for files only"),
            ({"recipe": mpoc.Recipe(max_drop=1.0)}, "max_drop is for files only"),
            ({"recipe": mpoc.Recipe()}, "exactly one of"),
            ({"recipe": "no-such.toml"}, "no-such.toml"),
            ({"size": 100}, "size"),
            ({"size": "much"}, "'much' is not a size"),
            ({"bond": 4, "layers": "none*"}, r"'none\*' matches no tensor"),
            ({"bond": 4, "shape": ["0=2x2:3x3"]}, r"0.*outputs, but the layer has 24 and 18"),
        ],
    )
    def test_rejects_bad_options(self, options: dict[str, Any], said: str) -> None:
        network = mlp()
        before = copy.deepcopy(network)
        with pytest.raises(UsageError, match=said) as caught:
            mpoc.compress(network, **options)
        assert "--" not in f"{caught.value} {caught.value.hint}"  # arguments, not options
        unchanged(network, before)

    def test_rejects_models_that_would_not_shrink(self) -> None:
        network = mlp()
        before = copy.deepcopy(network)
        with pytest.raises(MpocError, match=r"no layer would shrink, so nothing was changed \(0: would not"):
            mpoc.compress(network, bond=1000)
        unchanged(network, before)

    def test_rejects_models_without_linear_maps(self) -> None:
        network = mlp()
        mpoc.compress(network, **FULL)
        before = copy.deepcopy(network)
        with pytest.raises(MpocError, match="no layer is left to compress"):
            mpoc.compress(network, bond=2)
        unchanged(network, before)


@pytest.mark.parametrize("network", [mlp, lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))])
def test_a_size_is_kept_and_nearly_used(tmp_path: Path, network: Any) -> None:
    dense = network()
    full = sum(value.nbytes for value in dense.state_dict().values())
    size = full * 4 // 5 + 1200  # headers and manifest take most of the rest
    report = mpoc.compress(dense, size=size)
    saved = mpoc.save(dense, tmp_path / "m.safetensors")
    assert report.nbytes == saved.nbytes == (tmp_path / "m.safetensors").stat().st_size <= size


def test_a_recipe_holds_the_options_and_those_beside_it_win(tmp_path: Path) -> None:
    recipe = mpoc.Recipe(bond=3, allow_growth=True, rules=(mpoc.LayerRule("2", bond=2),))
    report = mpoc.compress(mlp(), recipe=recipe)
    assert [max(layer.bonds) for layer in report.layers] == [3, 2]
    (tmp_path / "r.toml").write_text('bond = 3\nallow-growth = true\n[layer."2"]\nbond = 2\n')
    assert mpoc.compress(mlp(), recipe=tmp_path / "r.toml").manifest.options == report.manifest.options
    report = mpoc.compress(mlp(), recipe=recipe, max_error=0.9)
    assert [max(layer.bonds) for layer in report.layers][1] == 2
    assert report.manifest.options == {"max_error": 0.9, "seed": 0}


def test_options_match_the_command() -> None:
    network = mlp()
    report = mpoc.compress(network, bond=3, shape=["0=6x4:3x6"], exclude=["2"], allow_growth=True)
    assert [layer.layer for layer in report.layers] == ["0"]
    assert report.layers[0].input_factors == (6, 4)
    assert report.layers[0].output_factors == (3, 6)
    one = mpoc.compress(mlp(), bond=3, shape="0=6x4:3x6", exclude="2", allow_growth=True)  # as text
    assert [(layer.name, layer.structure) for layer in one.layers] == [
        (layer.name, layer.structure) for layer in report.layers
    ]


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_are_truncated_svds(kind: str) -> None:
    """Against Eckart and Young: torch's SVD of every weight, truncated."""
    network, x = NETWORKS[kind]()
    dense = copy.deepcopy(network).eval()
    report = mpoc.compress(network.eval(), bond=3, form="svd", embeddings=True, allow_growth=True)
    state = dict(dense.named_parameters())
    for layer in report.layers:
        assert layer.form == "svd"
        matrix = as_one_matrix(layer.kind, state[layer.name].detach(), layer.transposed)
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        best = (left[:, :3] * values[:3] @ right[:3])[None]
        with torch.no_grad():
            state[layer.name].copy_(from_matrix(best, layer.structure))
    torch.testing.assert_close(network(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "tucker"}, "form='tucker'"),
        ({"form": "svd", "sites": 3}, "form='svd': has two factors"),
        ({"form": "svd+mpo"}, r"form='svd\+mpo' requires calibrate"),
        ({"form": "svd", "conv": "map", "input_shape": (1, 8, 6, 6)}, "form='svd' "),
    ],
)
def test_rejects_bad_combinations(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mpoc.compress(nn.Sequential(nn.Conv2d(8, 8, 3)), bond=2, **options)
