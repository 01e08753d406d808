"""Convolutions of every sort for the tests, and one of them by torch itself."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mpoc.nn.conv_map import geometry_of
from mpoc.tensor_networks.geometry import PADDING_MODES, Geometry

_CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def make_conv(settings: dict[str, Any], axes: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    return _CLASSES[axes](**settings, dtype=dtype)


def geometry_and_kernel(conv: nn.Module, size: tuple[int, ...]) -> tuple[Geometry, Tensor]:
    return geometry_of(conv, size), conv.get_parameter("weight").detach()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A random convolution of 1 to 3 axes, with any settings, and an input size that it fits."""
    axes = draw(st.integers(1, 3))
    each = st.integers(1, 2)
    groups = draw(each)
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(each) for _ in range(axes))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    sizes = st.sampled_from((4, 6, 8) if axes < 3 else (4,))
    size = tuple(max(draw(sizes), d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True))
    settings = {
        "in_channels": groups * draw(st.sampled_from((1, 2, 4))),
        "out_channels": groups * draw(st.sampled_from((1, 3))),
        "kernel_size": kernel,
        "stride": tuple(draw(each) for _ in range(axes)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
    }
    torch.manual_seed(draw(st.integers(0, 99)))
    return make_conv(settings, axes), size


def through_matrix(matrix: Tensor, x: Tensor, output_size: tuple[int, ...]) -> Tensor:
    """``matrix`` applied to (batch, C_in, …) flattened channel last, as (batch, C_out, …)."""
    y = x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1) @ matrix.T
    return y.reshape(x.shape[0], *output_size, -1).movedim(-1, 1)


def is_fully_known(geometry: Geometry) -> bool:
    """Whether every tap acts, and no two read the same input for the same output."""
    for axis in range(len(geometry.size)):
        taps = geometry.shifts(axis)
        pairs = [pair for tap in taps for pair in tap]
        if not all(taps) or len(set(pairs)) < len(pairs):
            return False
    return True
