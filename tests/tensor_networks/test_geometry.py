"""Geometries: sizes as torch's, positions, refusals, factors by axis."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.errors import UsageError
from mpoc.tensor_networks.geometry import Geometry, factors_by_axis, make_geometry
from tests.support.convolutions import convolutions

SOME = settings(max_examples=40, deadline=None, derandomize=True)
PLAIN = Geometry((4, 4), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


@SOME
@given(convolutions())
def test_output_size_matches_torch(drawn: tuple[Any, tuple[int, ...]]) -> None:
    conv, size = drawn
    x = torch.zeros(1, conv.in_channels, *size, dtype=torch.float64)
    geometry = make_geometry(
        tuple(conv.weight.shape), size, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    assert geometry.output_size == conv(x).shape[2:]


def test_shifts_match_hand_computed_values() -> None:
    def shifts(mode: str) -> list[list[tuple[int, int]]]:
        return make_geometry((1, 1, 3), (3,), (2,), (1,), (1,), padding_mode=mode).shifts(0)

    assert shifts("zeros") == [[(1, 1)], [(0, 0), (1, 2)], [(0, 1)]]
    assert shifts("circular") == [[(0, 2), (1, 1)], [(0, 0), (1, 2)], [(0, 1), (1, 0)]]
    assert shifts("reflect") == [[(0, 1), (1, 1)], [(0, 0), (1, 2)], [(0, 1), (1, 1)]]
    assert shifts("replicate") == [[(0, 0), (1, 1)], [(0, 0), (1, 2)], [(0, 1), (1, 2)]]


def test_default_padding_keeps_the_size() -> None:
    assert make_geometry((2, 2, 3, 5), (8, 9)).padding == (1, 2)
    wide = make_geometry((2, 2, 3), (9,), dilation=(2,))
    assert (wide.padding, wide.output_size) == ((2,), (9,))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": (4,)}, "input size 4 for a kernel of size 3x3"),
        ({"size": (4, 0)}, "must be positive"),
        (
            {"size": (4, 4), "stride": (1, 1, 1)},
            "1x1x1: strides must be one number, or one for each of 2 axes",
        ),
        ({"size": (4, 4), "groups": 3}, "8 output channels do not divide into 3 groups"),
        ({"size": (1, 4), "padding": (0,)}, "kernel of size 3x3 does not fit into an input of size 1x4"),
        ({"size": (4, 4), "padding_mode": "mirror"}, "'mirror': not one of zeros"),
        ({"size": (2, 2), "padding": (2,), "padding_mode": "reflect"}, "too wide for mode reflect"),
        ({"size": (2, 2), "padding": (3,), "padding_mode": "circular"}, "too wide for mode circular"),
    ],
)
def test_rejects_geometries_that_do_not_fit(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_geometry((8, 4, 3, 3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": (3,)},
        {"kernel_size": (5, 5)},
        {"output_size": (4, 0)},
        {"stride": (0, 1)},
        {"padding": (-1, 1)},
        {"groups": 3},
        {"padding_mode": "mirror"},
    ],
)
def test_check_detects_damage(changes: dict[str, object]) -> None:
    PLAIN.check((8, 4, 3, 3))
    with pytest.raises(ValueError, match="cannot be the geometry of a kernel"):
        Geometry(**{**vars(PLAIN), **changes}).check((8, 4, 3, 3))


def test_axis_factors_match_hand_computed_values() -> None:
    assert factors_by_axis((2, 8, 2), (2, 2, 8)) == ((2, 1, 1), (1, 2, 4), (1, 1, 2))
    assert factors_by_axis((32,), (2, 2, 8)) == ((2, 2, 8),)
    assert factors_by_axis((1, 4, 1), (1, 4)) == ((1, 1), (1, 4), (1, 1))
    assert factors_by_axis((4, 3), (2, 6)) == ((2, 2), (1, 3))
    assert factors_by_axis((4, 6), (8, 3)) == ((4, 1), (2, 3))
    assert factors_by_axis((3, 8), (8, 3)) is None
    assert factors_by_axis((6, 4), (4, 6)) is None


@SOME
@given(st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=5), st.data())
def test_parts_multiply_out_to_factors_and_axes(factors: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(factors)))
    axes = (math.prod(factors[:cut]), math.prod(factors[cut:]))
    found = factors_by_axis(tuple(factors), axes)
    assert found is not None
    assert [math.prod(parts) for parts in found] == factors
    assert tuple(math.prod(site[axis] for site in found) for axis in (0, 1)) == axes
