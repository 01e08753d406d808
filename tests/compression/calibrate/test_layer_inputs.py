"""Rows against loops written out by hand, and against what the layer makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoc.compression.calibrate.layer_inputs import EmbeddingInputs, ObservedLayer, Sample, find_layer
from mpoc.compression.calibrate.objective import one_matrix
from mpoc.errors import MpocError
from mpoc.tensor_networks.forms.layout import to_matrix
from mpoc.tensor_networks.structure import make_structure
from tests.support.architectures import tiny


def layer_of(module: nn.Module, name: str = "0.weight") -> ObservedLayer:
    found = find_layer(nn.Sequential(module), name)
    assert isinstance(found, ObservedLayer)
    return found


def rows_of(module: nn.Module, x: Tensor, mask: Tensor | None = None, sample: Sample | None = None) -> Tensor:
    return torch.cat(list(layer_of(module).inputs.blocks(x, mask, sample)), dim=-2)


def patches_by_hand(module: Any, x: Tensor) -> Tensor:
    """(positions, taps, C_in): one number at a time."""
    axes = x.dim() - 2
    mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
    padding = [p for p in reversed(module.padding) for _ in range(2)]
    x = F.pad(x, padding, mode=mode)
    sizes = [
        (x.shape[2 + a] - (module.kernel_size[a] - 1) * module.dilation[a] - 1) // module.stride[a] + 1
        for a in range(axes)
    ]
    found = []
    for example in x:
        for place in itertools.product(*map(range, sizes)):
            patch = []
            for tap in itertools.product(*map(range, module.kernel_size)):
                at = [place[a] * module.stride[a] + tap[a] * module.dilation[a] for a in range(axes)]
                patch.append(torch.stack([channel[tuple(at)] for channel in example]))
            found.append(torch.stack(patch))
    return torch.stack(found)


CONVOLUTIONS = [
    (nn.Conv2d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    (nn.Conv1d, {"kernel_size": 4, "padding": 3, "dilation": 2}),
    (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "stride": (1, 2, 1)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
]


@pytest.mark.parametrize(("cls", "options"), CONVOLUTIONS)
def test_extracts_patches(cls: Any, options: dict[str, Any]) -> None:
    module = cls(4, 8, **options)
    x = torch.randn(2, 4, *(5, 4, 6)[3 - len(module.kernel_size) :])
    byhand = patches_by_hand(module, x)  # (n, taps, C_in)
    groups = module.groups
    rows = rows_of(module, x)
    parts = byhand.unflatten(-1, (groups, 4 // groups))
    wanted = parts.permute(2, 0, 1, 3).flatten(2)
    assert torch.equal(rows, wanted[0] if groups == 1 else wanted)
    assert layer_of(module).inputs.count(x, None) == rows.shape[-2]


@pytest.mark.parametrize(("cls", "options"), CONVOLUTIONS)
def test_kernel_matrix_times_patches_is_the_convolution(cls: Any, options: dict[str, Any]) -> None:
    module = cls(4, 8, **options)
    x = torch.randn(2, 4, *(5, 4, 6)[3 - len(module.kernel_size) :])
    axes = len(module.kernel_size)
    structure = make_structure(f"conv{axes}d", tuple(module.weight.shape))
    matrix = to_matrix(module.weight, structure).permute(1, 0, 2).flatten(1)  # (C_out, taps · C_in / groups)
    rows = rows_of(module, x)
    if module.groups > 1:
        by_group = rows @ matrix.unflatten(0, (module.groups, -1)).mT
        found = by_group.transpose(0, 1).flatten(1)
    else:
        found = rows @ matrix.T
    wanted = layer_of(module).inputs.outputs(module(x), None)
    assert torch.allclose(found + module.bias, wanted, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_handles_named_padding(padding: str) -> None:
    module = nn.Conv2d(2, 3, (5, 3), padding=padding, bias=False)
    x = torch.randn(2, 2, 7, 6)
    matrix = module.weight.flatten(2).permute(0, 2, 1).flatten(1)
    wanted = module(x).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(rows_of(module, x) @ matrix.T, wanted, atol=1e-5)


def test_handles_an_unbatched_image() -> None:
    module, x = nn.Conv2d(2, 3, 3), torch.randn(2, 5, 6)
    assert torch.equal(rows_of(module, x), rows_of(module, x[None]))
    inputs = layer_of(module).inputs
    assert torch.equal(inputs.outputs(module(x), None), inputs.outputs(module(x[None]), None))


def test_blocks_concatenate_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Conv2d(3, 3, 3, groups=3), torch.randn(7, 3, 6, 6)
    whole = rows_of(module, x)
    monkeypatch.setattr("mpoc.compression.calibrate.layer_inputs._AT_ONCE", 1000)
    blocks = list(layer_of(module).inputs.blocks(x, None, None))
    assert len(blocks) > 3
    assert torch.equal(torch.cat(blocks, dim=-2), whole)


def test_samples_positions() -> None:
    module = nn.Conv2d(3, 3, 3, padding=1)
    x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    whole = rows_of(module, x)
    part = rows_of(module, x, sample=Sample(10, seed=1))
    places = [int((whole == row).all(-1).nonzero()) for row in part]
    assert len(places) == len(set(places)) == 60
    assert places == sorted(places)
    assert torch.equal(rows_of(module, y, sample=Sample(10, seed=1)), rows_of(module, y)[places])
    other = rows_of(module, x, sample=Sample(10, seed=2))
    assert not torch.equal(part, other)
    assert torch.equal(rows_of(module, x, sample=Sample(64, seed=1)), whole)


def test_ignores_padding_tokens() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    wanted = torch.cat([x[0, :2], x[1, 1:]])
    module = nn.Linear(3, 5)
    assert torch.equal(rows_of(module, x, mask), wanted)
    assert torch.equal(rows_of(module, x.flatten(0, 1), mask), wanted)
    assert layer_of(module).inputs.count(x, mask) == 5
    torch.testing.assert_close(layer_of(module).inputs.outputs(module(x), mask), module(wanted))


def test_counts_rows_that_are_not_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    pooled = torch.randn(2, 3)
    assert torch.equal(rows_of(nn.Linear(3, 5), pooled, mask), pooled)
    windows = torch.randn(2, 7, 3)
    assert torch.equal(rows_of(nn.Linear(3, 5), windows, mask), windows.flatten(0, 1))
    assert torch.equal(rows_of(nn.Linear(3, 5), pooled[0]), pooled[:1])


def test_embedding_counts_its_indices() -> None:
    inputs = layer_of(nn.Embedding(6, 2)).inputs
    assert isinstance(inputs, EmbeddingInputs)
    ids, mask = torch.tensor([[1, 1, 5], [2, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert inputs.counts(ids, mask).tolist() == [0, 2, 1, 0, 0, 1]
    assert inputs.counts(ids, None).tolist() == [2, 2, 1, 0, 0, 1]
    assert inputs.count(ids, mask) == 4


def test_finds_conv1d_of_transformers() -> None:
    network = tiny("gpt2")
    found = find_layer(network, "transformer.h.0.mlp.c_fc.weight")
    assert isinstance(found, ObservedLayer)
    assert found.inputs.features == 32
    assert found.modules == ("transformer.h.0.mlp.c_fc",)


def test_finds_shared_weights() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    found = find_layer(network, "2.weight")
    assert isinstance(found, ObservedLayer)
    assert found.modules == ("2", "0")


def test_module_in_two_places_is_found_once() -> None:
    linear = nn.Linear(3, 3)
    found = find_layer(nn.Sequential(linear, linear), "0.weight")
    assert isinstance(found, ObservedLayer)
    assert found.modules == ("0",)


def test_gives_reasons_for_unsupported_layers() -> None:
    gpt2 = tiny("gpt2")
    tied = find_layer(gpt2, "transformer.wte.weight")
    assert tied == "tied: transformer.wte and lm_head use it in different ways"
    network = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, groups=2), "lstm": nn.LSTM(3, 4)})
    assert find_layer(network, "up.weight") == "its inputs cannot be seen from outside a ConvTranspose2d"
    assert find_layer(network, "lstm.weight_ih_l0") == "its inputs cannot be seen from outside a LSTM"
    with pytest.raises(MpocError, match=r"has no weight 'down\.weight'"):
        find_layer(network, "down.weight")


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"stride": 3, "output_padding": 2, "dilation": 2}]
)
@torch.no_grad()
def test_patches_of_transposed_convolutions_have_the_gradients_products(options: dict[str, Any]) -> None:
    """Rows x and patches p of a gradient: Σ x pᵀ is the gradient at the kernel."""
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(3, 4, 3, **options).double()
    x = torch.randn(2, 3, 5, 6).double()
    found = find_layer(nn.Sequential(module), "0.weight")
    assert isinstance(found, ObservedLayer)
    with torch.enable_grad():
        output = module(x)
        gradient = torch.randn_like(output)
        (wanted,) = torch.autograd.grad(output, [module.weight], gradient)
    (rows,) = found.inputs.blocks(x, None, None)
    product = rows.T @ found.inputs.outputs(gradient, None)  # (C_in, taps · C_out)
    assert torch.allclose(product, one_matrix(wanted, "conv2d", False))
    assert found.inputs.count(x, None) == len(rows) == 2 * 5 * 6
