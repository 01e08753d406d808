from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mpoc.nn
from tests.nn.layers import gradients, pair, pulled_back, with_cores

EVERY_CLASS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


def same(dense: nn.Module, layer: Any, x: Tensor) -> None:
    """Outputs, and gradients of input, bias and cores."""
    expected, found = gradients(dense, x), gradients(layer, x)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    assert ("bias" in found[1]) == ("bias" in expected[1])
    if "bias" in expected[1]:
        torch.testing.assert_close(found[1]["bias"], expected[1]["bias"])
    cores = pulled_back(list(layer.cores), layer.structure, expected[1]["weight"])
    torch.testing.assert_close([found[1][f"cores.{k}"] for k in range(len(cores))], cores)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``nn.Conv2d``."""
    groups = draw(st.integers(1, 3))
    two = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return {
        "in_channels": groups * draw(st.integers(1, 5)),
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": draw(two),
        "stride": draw(two),
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        "dilation": draw(two),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.slow
@given(geometries(), st.integers(2, 3), st.integers(1, 5), st.integers(0, 2))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_matches_the_dense_layer(geometry: dict[str, Any], sites: int, bond: int, batch: int) -> None:
    dense, layer = pair(nn.Conv2d(**geometry).double(), max_bond=bond, sites=sites)
    same(dense, layer, torch.randn(batch, geometry["in_channels"], 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY_CLASS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_convolution_class_is_supported(name: str, bias: bool) -> None:
    axes = int(name[-2])
    plain = getattr(nn, name)(6, 4, 3, stride=2, padding=1, bias=bias).double()
    dense, layer = pair(plain)
    assert type(layer) is getattr(mpoc.nn, f"MPO{name}")
    assert isinstance(layer, type(dense))
    same(dense, layer, torch.randn(2, 6, *[5] * axes, dtype=torch.float64))
    assert layer(torch.randn(6, *[5] * axes, dtype=torch.float64)).dim() == axes + 1  # without a batch


def test_transposed_convolution_accepts_output_size() -> None:
    dense, layer = pair(nn.ConvTranspose2d(4, 6, 3, stride=2))
    x = torch.randn(1, 4, 5, 5)
    assert layer(x, output_size=[12, 11]).shape == (1, 6, 12, 11)
    torch.testing.assert_close(layer(x, output_size=[12, 11]), dense(x, output_size=[12, 11]))


def test_keeps_strides_groups_and_padding_mode() -> None:
    plain = nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1, groups=2, padding_mode="reflect")
    dense, layer = pair(plain)
    assert (layer.stride, layer.groups, layer.padding_mode) == ((2, 1), 2, "reflect")
    x = torch.randn(2, 8, 9, 9)
    assert layer(x).shape == (2, 12, 5, 9)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-4)


def test_gradients_match_finite_differences() -> None:
    layer = with_cores(nn.Conv2d(2, 4, 2, stride=(1, 2), padding=1).double(), max_bond=2)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_keeps_channels_last() -> None:
    dense, layer = pair(nn.Conv2d(4, 8, 3))
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


def test_autocast_matches_a_dense_layer() -> None:
    dense, layer = pair(nn.Conv2d(4, 8, 3), max_bond=2)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), dense(x), rtol=0.05, atol=0.3)
