from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.reproduce.image_states import ORDERS, from_sites, to_sites
from mpoc.tensor_networks.factors import permutation


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_morton_order_matches_that_of_layers(depth: int) -> None:
    side = 1 << depth
    numbers = torch.arange(side**2).reshape(1, 1, side, side)
    expected = permutation(f"morton:{side}x{side}", side**2, (4,) * depth)
    assert tuple(to_sites(numbers, "morton").flatten().tolist()) == expected
    assert to_sites(numbers, "raster").flatten().tolist() == [*range(side**2)]


def test_sites_are_digits_or_quadrants() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    morton, raster = (to_sites(x, order)[0] for order in ORDERS)
    for row in range(8):
        for column in range(8):
            quadrants = [2 * (row >> k & 1) + (column >> k & 1) for k in (2, 1, 0)]
            number = 8 * row + column
            digits = [number >> 4, number >> 2 & 3, number & 3]
            assert morton[tuple(quadrants)] == raster[tuple(digits)] == x[0, 0, row, column]


def test_pads_on_all_sides() -> None:
    sites = to_sites(torch.ones(1, 1, 28, 28), "raster")
    assert sites.shape == (1, *(4,) * 5)
    padded = sites.reshape(32, 32)
    assert padded[2:30, 2:30].min() == 1 and padded.sum() == 28 * 28


@given(
    st.sampled_from([*ORDERS]),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.integers(1, 9),
    st.integers(1, 9),
)
@settings(max_examples=15, deadline=None)
def test_pixels_round_trip(order: str, count: int, channels: int, height: int, width: int) -> None:
    x = torch.randn(count, channels, height, width)
    sites = to_sites(x, order)
    assert sites.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(from_sites(sites, order, (channels, height, width)), x, rtol=0, atol=0)
