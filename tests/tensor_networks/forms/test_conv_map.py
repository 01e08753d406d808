"""The dense map of a convolution against torch's own convolution, and the way back to a kernel."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from mpoc.tensor_networks.forms.layout import from_full_taps, full_taps, map_of_kernel, nearest_kernel
from mpoc.tensor_networks.geometry import make_geometry
from tests.support.convolutions import convolutions, geometry_and_kernel, is_fully_known, through_matrix

SOME = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.slow
@SOME
@given(convolutions())
def test_map_matches_the_convolution(drawn: tuple[nn.Conv2d, tuple[int, ...]]) -> None:
    conv, size = drawn
    geometry, kernel = geometry_and_kernel(conv, size)
    x = torch.randn(2, conv.in_channels, *size, dtype=torch.float64)
    y = through_matrix(map_of_kernel(kernel, geometry), x, geometry.output_size)
    conv.bias = None
    torch.testing.assert_close(y, conv(x).detach())


@pytest.mark.slow
@SOME
@given(convolutions())
def test_nearest_kernel_of_a_convolution_is_its_kernel(drawn: tuple[nn.Conv2d, tuple[int, ...]]) -> None:
    geometry, kernel = geometry_and_kernel(*drawn)
    matrix = map_of_kernel(kernel, geometry)
    back = nearest_kernel(matrix, geometry)
    torch.testing.assert_close(map_of_kernel(back, geometry), matrix)
    if is_fully_known(geometry):
        torch.testing.assert_close(back, kernel)


@pytest.mark.slow
@SOME
@given(convolutions())
def test_nearest_kernel_leaves_an_orthogonal_rest(
    drawn: tuple[nn.Conv2d, tuple[int, ...]],
) -> None:
    geometry, kernel = geometry_and_kernel(*drawn)
    matrix = torch.randn_like(map_of_kernel(kernel, geometry))
    rest = matrix - map_of_kernel(nearest_kernel(matrix, geometry), geometry)
    other = map_of_kernel(torch.randn_like(kernel), geometry)
    assert abs(float((rest * other).sum())) <= 1e-10 * float(rest.norm() * other.norm()) + 1e-12


def test_averages_over_the_positions_of_a_tap() -> None:
    geometry = make_geometry((1, 1, 3), (3,))
    matrix = torch.tensor([[1.0, 5.0, 9.0], [4.0, 2.0, 7.0], [9.0, 6.0, 3.0]])
    assert nearest_kernel(matrix, geometry).flatten().tolist() == [5.0, 2.0, 6.0]


def test_unused_taps_are_zero() -> None:
    geometry = make_geometry((2, 2, 3, 3), (1, 1))
    kernel = torch.randn(2, 2, 3, 3)
    back = nearest_kernel(map_of_kernel(kernel, geometry), geometry)
    torch.testing.assert_close(back[:, :, 1, 1], kernel[:, :, 1, 1])
    assert int((back != 0).sum()) == 4


def test_groups_are_diagonal_blocks() -> None:
    geometry = make_geometry((4, 1, 1), (1,), groups=2)
    kernel = torch.arange(1.0, 5.0).reshape(4, 1, 1)
    assert full_taps(kernel, geometry)[0].tolist() == [[1, 0], [2, 0], [0, 3], [0, 4]]
    assert torch.equal(from_full_taps(torch.ones(1, 4, 2), geometry), torch.ones(4, 1, 1))
