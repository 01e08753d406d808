"""Pixels as the index of a chain of sites: an image of side 2ᵐ is a tensor of m indices of 4.

In Morton order an index names a quadrant, from the whole image to single pixels: the coarse-grained addresses
of Latorre, "Image compression and entanglement", arXiv:quant-ph/0510031.  In raster order, row by row, an
index is a digit of the pixel's number.  Colour is a site of its own in front, where it needs the smallest
bonds.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

ORDERS = {"morton": "Morton order", "raster": "raster order"}  # with what people call them


def to_sites(x: Tensor, order: str) -> Tensor:
    """Images → tensors of their sites.

    Args:
        x: (n, C, H, W); black rows and columns are added on all sides to the next 2ᵐ × 2ᵐ.
        order: one of ``ORDERS``.

    Returns:
        (n, 4, …, 4) of m sites, or (n, C, 4, …, 4) of colour images.
    """
    n, channels, height, width = x.shape
    depth, (top, left) = _depth(height, width), _margins(height, width)
    side = 1 << depth
    bits = pad(x, (left, side - width - left, top, side - height - top))
    bits = bits.reshape(n, channels, *(2,) * (2 * depth))
    if order == "morton":
        bits = bits.permute(_interleaving(depth))
    sites = bits.reshape(n, channels, *(4,) * depth)
    return sites[:, 0] if channels == 1 else sites


def from_sites(sites: Tensor, order: str, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`to_sites`: (n, C, H, W) with ``shape`` (C, H, W), without what was added."""
    channels, height, width = shape
    depth, (top, left) = _depth(height, width), _margins(height, width)
    bits = sites.reshape(-1, channels, *(2,) * (2 * depth))
    if order == "morton":
        axes = _interleaving(depth)
        bits = bits.permute([axes.index(axis) for axis in range(len(axes))])
    images = bits.reshape(-1, channels, 1 << depth, 1 << depth)
    return images[:, :, top : top + height, left : left + width]


def _depth(height: int, width: int) -> int:
    """The smallest m with 2ᵐ × 2ᵐ pixels for the image, at least 1."""
    return max(1, (max(height, width) - 1).bit_length())


def _margins(height: int, width: int) -> tuple[int, int]:
    """Rows above and columns left of the image."""
    side = 1 << _depth(height, width)
    return (side - height) // 2, (side - width) // 2


def _interleaving(depth: int) -> list[int]:
    """The permutation of (n, C, row bits, column bits) that pairs row bit k with column bit k."""
    return [0, 1, *(axis for k in range(depth) for axis in (2 + k, 2 + depth + k))]
