"""The form ``svd``: two factors, on every kind of layer and all the way through the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import UsageError
from mpoc.io.manifest_reader import read_manifest
from mpoc.tensor_networks.forms.layout import from_matrix, to_matrix
from mpoc.tensor_networks.structure import low_rank_structure, make_structure
from tests.nn.layers import NETWORKS

KINDS = [
    ("linear", (12, 20), False),
    ("linear", (20, 12), True),
    ("embedding", (30, 8), False),
    ("conv1d", (6, 8, 3), False),
    ("conv2d", (6, 8, 3, 2), False),
    ("experts", (4, 10, 6), False),
    ("experts", (4, 10, 6), True),
]


def as_one_matrix(kind: str, weight: Tensor, transposed: bool) -> Tensor:
    """Element by element as the form's words say: taps with the inputs, experts with the outputs."""
    if kind.startswith("conv"):
        rows = []
        for output in weight:
            taps = output.flatten(1)  # (C_in, taps)
            rows.append(torch.stack([taps[c, t] for t in range(taps.shape[1]) for c in range(len(taps))]))
        return torch.stack(rows)
    blocks = weight.reshape(-1, *weight.shape[-2:])
    return torch.cat([block.T if transposed else block for block in blocks])


@pytest.mark.parametrize(("kind", "shape", "transposed"), KINDS)
def test_matrix_round_trip(kind: str, shape: tuple[int, ...], transposed: bool) -> None:
    structure = low_rank_structure(kind, shape, transposed)
    weight = torch.randn(shape, dtype=torch.float64)
    matrix = to_matrix(weight, structure)
    assert structure.form == "svd"
    assert torch.equal(matrix[0], as_one_matrix(kind, weight, transposed))
    assert torch.equal(from_matrix(matrix, structure), weight)
    assert structure.num_parameters(2) == 2 * (matrix.shape[1] + matrix.shape[2])


def test_other_factors_are_not_svd() -> None:
    assert make_structure("linear", (12, 20), factors=((12, 1), (1, 20))).form == "svd"
    assert make_structure("linear", (12, 20), factors=((1, 12), (20, 1))).form == "mpo"
    assert make_structure("conv2d", (12, 20, 3, 3)).form == "mpo"


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


def test_file_records_its_form_and_loads(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Conv2d(16, 16, 3), nn.Linear(64, 32))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    path = tmp_path / "m.mpo.safetensors"
    compress_checkpoint(tmp_path / "m.pt", path, make_recipe(None, {"ratio": 0.5, "form": "svd"}))
    assert {layer.form for layer in read_manifest(path).layers} == {"svd"}
    loaded: nn.Sequential = mpoc.load(path, copy.deepcopy(network))  # type: ignore[assignment]
    mpoc.compress(network, ratio=0.5, form="svd")
    x = torch.randn(5, 48)
    assert torch.equal(loaded[0](x), network[0](x))
    image = torch.randn(2, 16, 8, 8)
    assert torch.equal(loaded[1](image), network[1](image))


def test_recipe_mixes_forms(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    file = tmp_path / "recipe.toml"
    file.write_text('bond = 4\nform = "svd"\n[layer."1"]\nform = "mpo"\nsites = 3\n')
    torch.save(network.state_dict(), tmp_path / "m.pt")
    done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(file, {}))
    assert [(layer.form, len(layer.output_factors)) for layer in done.manifest.layers] == [
        ("svd", 2),
        ("mpo", 3),
    ]


def test_svd_layers_ignore_sites(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    file = tmp_path / "recipe.toml"
    file.write_text('bond = 4\nsites = 3\n[layer."1"]\nform = "svd"\n')
    torch.save(network.state_dict(), tmp_path / "m.pt")
    done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(file, {}))
    assert [layer.form for layer in done.manifest.layers] == ["mpo", "svd"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "tucker"}, "not one of mpo, svd"),
        ({"form": "svd", "sites": 3}, "two factors"),
        ({"form": "svd+mpo"}, "--form svd\\+mpo compares what layers do: it needs --calibrate"),
        ({"form": "svd", "conv": "map", "input_shape": (1, 8, 6, 6)}, "of kernels, not of whole maps"),
    ],
)
def test_rejects_bad_combinations(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mpoc.compress(nn.Sequential(nn.Conv2d(8, 8, 3)), bond=2, **options)
