"""Whole-map layers against the convolutions they came from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpoc.nn import MPOConvMap1d, MPOConvMap2d, MPOConvMap3d, adopt, use_weights
from mpoc.nn.conv_map import geometry_of
from mpoc.tensor_networks.fit.conv_map import fit_mpo
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.convolutions import convolutions, through_matrix

SOME = settings(max_examples=20, deadline=None, derandomize=True)


def map_structure(conv: nn.Module, size: tuple[int, ...], **options: Any) -> Structure:
    shape = tuple(conv.get_parameter("weight").shape)
    return make_structure("convmap", shape, geometry=geometry_of(conv, size), **options)


def as_map(conv: Any, size: tuple[int, ...], bond: int = 10**6, **options: Any) -> Any:
    """``conv`` itself with the cores of its map."""
    structure = map_structure(conv, size, **options)
    adopt(conv, "weight", fit_mpo(conv.weight.detach(), structure, Truncation(bond)).form.cores, structure)
    return conv


def test_sizes_match_torch_for_named_padding() -> None:
    same = geometry_of(nn.Conv2d(2, 2, (2, 4), padding="same"), (5, 6))
    assert (same.padding, same.output_size) == ((0, 1), (5, 6))
    assert geometry_of(nn.Conv1d(2, 2, 3, padding="valid"), (5,)).output_size == (3,)


@SOME
@given(convolutions(), st.booleans())
def test_full_bond_is_the_convolution(drawn: tuple[nn.Conv2d, tuple[int, ...]], held: bool) -> None:
    conv, size = drawn
    dense = copy.deepcopy(conv)
    layer = as_map(conv, size).eval()
    layer.requires_grad_(False)
    use_weights(layer, "dense" if held else "cores")
    x = torch.randn(3, dense.in_channels, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_named_padding_with_even_kernels(padding: str, mode: str) -> None:
    settings: dict[str, Any] = {"padding": padding, "padding_mode": mode, "dtype": torch.float64}
    conv = nn.Conv2d(3, 4, (2, 4), **settings)
    dense = copy.deepcopy(conv)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(as_map(conv, (5, 6))(x), dense(x))


def test_cores_act_as_their_matrix_with_bias_per_channel() -> None:
    layer = as_map(nn.Conv2d(6, 8, 3, padding=1, stride=2), (4, 6), bond=3, sites=4)
    with torch.no_grad():
        for core in layer.cores:
            core += torch.randn_like(core)
    matrix = MPO(list(layer.cores), layer.structure).to_matrix()[0]
    x = torch.randn(5, 6, 4, 6)
    expected = through_matrix(matrix, x, (2, 3)) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_padded_factors_act_as_the_cropped_matrix() -> None:
    conv = nn.Conv1d(1, 1, 3, padding=1, dtype=torch.float64)
    structure = Structure("convmap", (1, 1, 3), False, (2, 4), (3, 3), geometry_of(conv, (7,)))
    assert structure.padding == (1, 2)
    fit = fit_mpo(conv.weight.detach(), structure, Truncation(99))
    assert fit.relative_error < 1e-12
    x = torch.randn(2, 1, 7, dtype=torch.float64)
    expected = conv(x).detach()
    adopt(conv, "weight", fit.form.cores, structure)
    torch.testing.assert_close(conv(x), expected)


def test_gradients_reach_cores_bias_and_input() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    layer = as_map(conv, (2, 3), bond=2)

    def answer(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
    assert len(leaves) == len(layer.cores) + 1
    assert torch.autograd.gradcheck(answer, (x, *leaves))


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 5, 4, 4), (6, 16), (1, 1, 6, 4, 4)])
def test_rejects_another_size(shape: tuple[int, ...]) -> None:
    layer = as_map(nn.Conv2d(6, 8, 3, padding=1), (4, 4), bond=2)
    with pytest.raises(ValueError, match=r"compressed as one map of \(batch, 6, 4, 4\)"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("dense", "counterpart", "size"),
    [
        (nn.Conv1d, MPOConvMap1d, (6,)),
        (nn.Conv2d, MPOConvMap2d, (4, 4)),
        (nn.Conv3d, MPOConvMap3d, (4, 2, 2)),
    ],
)
def test_keeps_the_module_and_its_attributes(
    dense: Any, counterpart: type[nn.Module], size: tuple[int, ...]
) -> None:
    conv = dense(4, 6, 3, padding=1, stride=2, bias=False).eval()
    conv.weight.requires_grad_(False)
    layer = as_map(conv, size, bond=2)
    assert layer is conv
    assert (type(layer), counterpart.__mro__.count(dense)) == (counterpart, 1)
    assert (layer.in_channels, layer.out_channels, layer.bias) == (4, 6, None)
    assert set(layer.stride) == {2} and not layer.training
    assert not any(core.requires_grad for core in layer.cores)
    assert [name for name, _ in layer.named_parameters()] == [f"cores.{k}" for k in range(len(layer.cores))]
    assert "bonds=(1, " in repr(layer)


def test_weight_has_a_shape_but_no_kernel() -> None:
    layer = as_map(nn.Conv2d(6, 8, 3, padding=1), (4, 4), bond=2)
    assert (layer.weight.shape, layer.weight.dtype) == ((8, 6, 3, 3), torch.float32)
    with pytest.raises(RuntimeError, match=r"has no kernel.*expand --project"):
        torch.clone(layer.weight)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Conv2d(6, 8, 3, padding=1, stride=2), r"stride=\(1, 1\).*stride=\(2, 2\)"),
        (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.ConvTranspose2d(8, 6, 3, padding=1), "ConvTranspose2d cannot be taken as one map"),
    ],
)
def test_rejects_cores_of_another_convolution(other: nn.Module, said: str) -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    structure = map_structure(conv, (4, 4))
    cores = fit_mpo(conv.weight.detach(), structure, Truncation(2)).form.cores
    with pytest.raises(ValueError, match=said):
        adopt(other, "weight", cores, structure)
    assert isinstance(other.weight, nn.Parameter)


def test_state_dict_round_trip() -> None:
    layer = as_map(nn.Conv2d(6, 8, 3, padding=1), (4, 4), bond=3)
    other = as_map(nn.Conv2d(6, 8, 3, padding=1), (4, 4), bond=3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(layer(x), other(x)) and torch.equal(copy.deepcopy(layer)(x), other(x))


@pytest.mark.slow
def test_compiles_into_one_graph_with_any_batch() -> None:
    layer = as_map(nn.Conv2d(6, 8, 3, padding=1), (4, 4), bond=3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 6, 4, 4),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 6, 4, 4)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_matches_a_convolution(bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
    dense, layer, x = copy.deepcopy(conv), as_map(conv, (4, 4)).eval(), torch.randn(2, 4, 4, 4)
    layer.requires_grad_(False)
    for weights in ("cores", "dense"):
        with torch.autocast("cpu", torch.bfloat16):
            use_weights(layer, weights)
            assert layer(x).dtype == dense(x).dtype == torch.bfloat16
            torch.testing.assert_close(layer(x), dense(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)  # what is held is not rounded
