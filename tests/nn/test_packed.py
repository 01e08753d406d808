"""Layers that hold codes: the numbers of a file, in no more memory than its codes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.errors import UsageError
from mpoc.io.manifest_reader import read_manifest
from mpoc.nn.packed import PackedMatrix, PackedWeight
from mpoc.quantize.codes import CodedTensor, GridTensor, QuantizedTensor
from mpoc.quantize.storage import Coded, Grid, Storage
from tests.nn.layers import floats

Made = tuple[nn.Module, Tensor]
LAYERS: dict[str, Made] = {
    "linear": (nn.Linear(128, 96), floats(5, 128)),
    "conv": (nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=2), floats(2, 32, 8, 8)),
    "transposed": (nn.ConvTranspose2d(32, 48, 3, stride=2), floats(2, 32, 5, 5)),
    "embedding": (nn.Embedding(300, 64, padding_idx=3), torch.arange(12).reshape(3, 4)),
}
STORAGES: dict[str, dict[str, Any]] = {
    "grid 4": {"bits": 4},
    "grid 3": {"bits": 3},
    "coded": {"bits": 4, "storage": "coded"},
    "cores": {"bond": 12, "bits": 4, "form": "svd", "allow_growth": True},
}


def saved(kind: str, storage: str) -> tuple[nn.Module, Tensor]:
    """A dense network, whose compression is in the file ``m.safetensors``, and an input."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]
    network = nn.Sequential(copy.deepcopy(layer)).eval()
    compressed = copy.deepcopy(network)
    mpoc.compress(compressed, embeddings=True, **STORAGES[storage])
    mpoc.save(compressed, "m.safetensors", force=True)
    return network, x


def held_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers but biases."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if not name.endswith("bias"))


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_computes_with_the_numbers_of_the_file(kind: str, storage: str) -> None:
    network, x = saved(kind, storage)
    dense = mpoc.load("m.safetensors", copy.deepcopy(network), weights="cores")
    packed = mpoc.load("m.safetensors", network, weights="packed")
    with torch.no_grad():
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in packed.named_parameters() if not name.endswith("bias")]


@pytest.mark.parametrize(("storage", "bits"), [("grid 4", 4), ("grid 3", 3), ("coded", 8)])
def test_holds_little_more_than_the_codes(storage: str, bits: int) -> None:
    network, _ = saved("linear", storage)
    (layer,) = read_manifest(Path("m.safetensors")).layers
    assert held_bytes(mpoc.load("m.safetensors", network, weights="packed")) <= (
        1.1 * layer.num_original * bits / 8 + 64
    )


def random_codes(spec: Storage, rows: int, columns: int) -> QuantizedTensor:
    if isinstance(spec, Grid):
        groups = rows, spec.groups(columns)
        codes, zeros = (
            torch.randint(spec.levels, shape, dtype=torch.uint8) for shape in ((rows, columns), groups)
        )
        return GridTensor(codes, torch.rand(groups).half(), None if spec.symmetric else zeros, spec)
    by_row, by_column = (torch.randint(16, (side,), dtype=torch.int8) for side in (rows, columns))
    return CodedTensor(torch.randint(-128, 128, (rows, columns), dtype=torch.int8), by_row, by_column, 0.01)


@pytest.mark.parametrize("spec", [Grid(5, 32), Grid(8), Grid(2, 8, symmetric=True), Coded()])
def test_product_is_that_of_the_numbers(spec: Storage) -> None:
    """In blocks, with and without a gradient, and in bfloat16 of few vectors and of many."""
    torch.manual_seed(0)
    quantized = random_codes(spec, 1200, 1024)
    packed = PackedMatrix(quantized, torch.float32)
    values = quantized.values()
    x = floats(2, 6, 1024).requires_grad_()
    expected = x.detach() @ values.T
    size = float(expected.norm())
    y = packed.product(x)
    y.sum().backward()
    assert x.grad is not None
    assert (y - expected).norm() < 1e-5 * size
    assert (packed.product(x.detach()) - expected).norm() < 1e-5 * size
    assert (x.grad[0, 0] - values.sum(0)).norm() < 1e-4 * values.sum(0).norm()
    many = x.detach().bfloat16()
    for half in (many, many[0, 0], many[0].T.contiguous().T):
        product, exact = packed.product(half), half.float() @ values.T
        assert product.dtype == torch.bfloat16 and product.shape == exact.shape
        assert (product.float() - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("storage", STORAGES)
def test_survives_copies_pickles_and_state_dicts(storage: str) -> None:
    network, x = saved("linear", storage)
    fresh = copy.deepcopy(network)
    packed = mpoc.load("m.safetensors", network, weights="packed")
    expected = packed(x)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again(x), expected)
    other = mpoc.load("m.safetensors", fresh, weights="packed")
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), expected)
    half = packed.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("storage", STORAGES)
def test_unpacks_into_what_the_file_holds(storage: str) -> None:
    network, x = saved("linear", storage)
    dense = mpoc.load("m.safetensors", copy.deepcopy(network), weights="cores")
    packed = mpoc.load("m.safetensors", network, weights="packed")
    mpoc.nn.use_weights(packed, "cores")
    assert packed.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(packed(x), dense(x))
    mpoc.save(packed, "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("m.safetensors").read_bytes()


def test_tied_layers_share_their_codes() -> None:
    embedding = nn.Embedding(64, 64)
    network = nn.Sequential(embedding, nn.Linear(64, 64, bias=False))
    network.get_submodule("1").weight = embedding.weight
    compressed = copy.deepcopy(network)
    mpoc.compress(compressed, embeddings=True, bits=8)
    mpoc.save(compressed, "m.safetensors")
    packed: Any = mpoc.load("m.safetensors", network.eval(), weights="packed")
    assert packed[0].packed is packed[1].packed
    mpoc.nn.use_weights(packed, "auto")
    assert packed[0].weight is packed[1].weight


def test_leaves_other_modules_as_they_are() -> None:
    network = nn.Sequential(nn.LSTM(16, 16), nn.Linear(16, 64))[:1]
    compressed = copy.deepcopy(network)
    mpoc.compress(compressed, bits=8)
    mpoc.save(compressed, "m.safetensors")
    packed = mpoc.load("m.safetensors", network, weights="packed")
    assert not [module for module in packed.modules() if isinstance(module, PackedWeight)]
    assert packed(floats(3, 16))[0].shape == (3, 16)


def test_needs_the_codes_of_a_file() -> None:
    with pytest.raises(UsageError, match="codes are in the file"):
        mpoc.nn.use_weights(nn.Linear(3, 3), "packed")


@pytest.mark.parametrize("columns", [17, 24, 64])
def test_few_vectors_of_bfloat16_have_any_width(columns: int) -> None:
    """torch's kernel of int8 codes reads beyond the end of rows that are not whole vectors."""
    torch.manual_seed(0)
    quantized = random_codes(Coded(), 33, columns)
    packed, x = PackedMatrix(quantized, torch.bfloat16), floats(3, columns).bfloat16()
    exact = x.float() @ quantized.values().T
    assert (packed.product(x).float() - exact).norm() < 0.01 * exact.norm()
    assert packed.product(x[:0]).shape == (0, 33)
