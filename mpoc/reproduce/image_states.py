"""Images as matrix product states: how well a given number of stored numbers represents an image.

An image of side 2ᵐ is a tensor of m indices of 4.  In Morton order an index names a quadrant, from the whole
image down to single pixels (Latorre, "Image compression and entanglement", arXiv:quant-ph/0510031).  In
raster order, row by row, an index is a digit of the number of the pixel.  Colour is a site of its own in
front, where it needs the smallest bonds.

A state of sites d_1, …, d_m has cores (D_{k-1}, d_k, D_k), D_0 = D_m = 1; a stack of states has one more axis
in front.  Every tensor of a stack gets the same bonds: the smaller of D and the rank of the unfolding.
Nothing is trained: images of a data set become states at several bonds, beside SVD and discrete cosine
transform of the same size, as in the outlook of Gao et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoc.data import Data, open_data
from mpoc.errors import UsageError
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import rounded

ORDERS = {"morton": "Morton order", "raster": "raster order"}  # with what people call them

NAME = "mps-images"
SOURCE = "outlook of Gao et al. 2020, after Latorre, arXiv:quant-ph/0510031"
SCHEMA = "mpoc.image-states/1"
BONDS = (1, 2, 3, 4, 6, 8, 12, 16)
_IMAGES, _QUICK_IMAGES = 1000, 100
_AT_ONCE = 250  # images of a stack
# Mean squared error of rounding to 8-bit pixels, 58.9 dB: smaller errors count as this, since exact images
# would make every mean infinite.
_ROUNDING = 1 / (12 * 255**2)


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
    """The smallest m, at least 1, such that 2ᵐ × 2ᵐ pixels hold the image."""
    return max(1, (max(height, width) - 1).bit_length())


def _margins(height: int, width: int) -> tuple[int, int]:
    """Rows above and columns left of the image."""
    side = 1 << _depth(height, width)
    return (side - height) // 2, (side - width) // 2


def _interleaving(depth: int) -> list[int]:
    """The permutation of (n, C, row bits, column bits) that pairs row bit k with column bit k."""
    return [0, 1, *(axis for k in range(depth) for axis in (2 + k, 2 + depth + k))]


def tt_svd_stack(tensors: Tensor, max_bond: int) -> list[Tensor]:
    """TT-SVD (Oseledets 2011, algorithm 1) of every tensor of a stack, with batched SVDs.

    Args:
        tensors: (n, d_1, …, d_m), of a floating dtype.
        max_bond: cap on every D_k.

    Returns:
        m cores (n, D_{k-1}, d_k, D_k), all but the last orthonormal from the left.
    """
    count, *sites = tensors.shape
    cores: list[Tensor] = []
    rest, bond = tensors.reshape(count, 1, -1), 1
    for site in sites[:-1]:
        left, values, right = torch.linalg.svd(rest.reshape(count, bond * site, -1), full_matrices=False)
        kept = min(max_bond, values.shape[1])
        cores.append(left[:, :, :kept].reshape(count, bond, site, kept))
        rest, bond = values[:, :kept, None] * right[:, :kept], kept
    cores.append(rest.reshape(count, bond, sites[-1], 1))
    return cores


def contract_stack(cores: Sequence[Tensor]) -> Tensor:
    """(n, d_1, …, d_m) of the cores that :func:`tt_svd_stack` returns."""
    left = cores[0].flatten(1, 2)
    for core in cores[1:]:
        left = torch.einsum("npa,nadb->npdb", left, core).flatten(1, 2)
    return left.reshape(len(left), *(core.shape[2] for core in cores))


def entropies(tensors: Tensor) -> Tensor:
    """(n, m − 1): entanglement entropy −Σ p ln p, p = s²/Σs², at every bond of every tensor (n, d_1, …, d_m).

    0 where a tensor is all zero.
    """
    count, *sites = tensors.shape
    per_bond = []
    for k in range(1, len(sites)):
        values = torch.linalg.svdvals(tensors.reshape(count, math.prod(sites[:k]), -1)).square()
        total = values.sum(1, keepdim=True)
        per_bond.append(torch.special.entr(values / total.where(total > 0, torch.ones_like(total))).sum(1))
    return torch.stack(per_bond, 1)


def low_rank_errors(x: Tensor) -> Tensor:
    """Squared errors of the best rank-r images: (n, R + 1), column r for rank r from 0.

    Args:
        x: (n, C, H, W); the matrix of an image is (C·H, W), of which rank r needs r·(C·H + W) numbers.
    """
    values = torch.linalg.svdvals(x.flatten(1, 2)).square()
    return _tails(values)


def cosine_errors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of images of which k coefficients of a discrete cosine transform are kept.

    The transform is orthonormal (type II), over rows, columns and colours of (n, C, H, W).

    Returns:
        Two of (n, C·H·W + 1), column k for k coefficients: each image's own largest; and the same places for
        all images, those with the largest mean square over them.
    """
    channels, height, width = (_cosines(size).to(x) for size in x.shape[1:])
    squares = torch.einsum("dc,vh,uw,nchw->ndvu", channels, height, width, x).flatten(1).square()
    common = squares[:, squares.mean(0).argsort(descending=True, stable=True)]
    return _tails(squares.sort(1, descending=True).values), _tails(common)


def _tails(squares: Tensor) -> Tensor:
    """(n, K) → (n, K + 1): the sum of each row from column k on."""
    tails = squares.flip(1).cumsum(1).flip(1)
    return torch.cat([tails, tails.new_zeros(len(tails), 1)], 1)


def _cosines(size: int) -> Tensor:
    """The orthonormal matrix of the discrete cosine transform of type II, (frequency, place)."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True)
class ImageStatesRequest:
    """The options of ``mpoc reproduce mps-images``."""

    data: Path
    bonds: tuple[int, ...] = BONDS
    seed: int = 0
    quick: bool = False
    format: str | None = None


@dataclass(frozen=True)
class Quality:
    """Peak signal-to-noise of some images at one number of stored numbers each."""

    numbers: int  # of an image
    kept: int  # bond, rank or coefficients
    decibels: float  # mean over the images of 10 log₁₀(1/mean squared error)
    sigma: float  # over the images
    of_mean_error: float  # 10 log₁₀(1/mean squared error of all images)


@dataclass(frozen=True)
class ImageStates:
    """The quality of images as states and by other methods, and their entropies."""

    data: Data
    split: str
    images: Tensor  # (n, C, H, W) float64 from 0 to 1
    states: dict[str, tuple[Quality, ...]]  # by order, one per bond
    peers: dict[str, tuple[Quality, ...]]  # by method, each the best of it that the same numbers hold
    entropies: dict[str, tuple[float, ...]]  # by order, mean over the images at every bond
    quick: bool

    @property
    def pixels(self) -> int:
        """Numbers of one image, C·H·W."""
        return self.images[0].numel()

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, documented in the guide (file-format-and-json)."""
        return {
            "schema": SCHEMA,
            "experiment": NAME,
            "source": SOURCE,
            "data": self.data.announce(),
            "measured": self.split,
            "images": len(self.images),
            "numbers_of_an_image": self.pixels,
            "quick": self.quick,
            "states": {name: [_as_dict(at) for at in states] for name, states in self.states.items()},
            "peers": {name: [_as_dict(at) for at in peers] for name, peers in self.peers.items()},
            "entropies": {name: list(map(rounded, values)) for name, values in self.entropies.items()},
        }


def _as_dict(at: Quality) -> dict[str, float]:
    values = {name: rounded(getattr(at, name)) for name in ("decibels", "sigma", "of_mean_error")}
    return {"numbers": at.numbers, "kept": at.kept, **values}


def measure_images(request: ImageStatesRequest, say: Callable[[str], None]) -> ImageStates:
    """Approximate images by states, and compare with other methods at the same size.

    Args:
        request: the images and bonds.
        say: called with messages.

    Raises:
        UsageError: no images, or a bond below 1.
        MpocError: bad data.
    """
    if min(request.bonds, default=0) < 1:
        raise UsageError("--bonds: one at least, each at least 1")
    data = open_data(request.data, request.format)
    if data.kind != "images":
        raise UsageError(f"{request.data}: {NAME} takes images, not {data.announce().partition(': ')[2]}")
    say(data.announce())
    split, x = _images(data, request)
    bonds = tuple(sorted(set(request.bonds)))
    states = {order: tuple(_quality(x, order, bond) for bond in bonds) for order in ORDERS}
    sizes = [at.numbers for at in states["morton"]]
    means = {order: tuple(_entropies(x, order).mean(0).tolist()) for order in ORDERS}
    return ImageStates(data, split, x, states, _peers(x, sizes), means, request.quick)


def approximate(x: Tensor, order: str, bond: int) -> tuple[Tensor, int]:
    """Approximate images by states at one bond.

    Args:
        x: (n, C, H, W).
        order: order of the pixels.
        bond: cap on every D_k.

    Returns:
        The same shape, and the numbers of one state.
    """
    shape = (x.shape[1], x.shape[2], x.shape[3])
    cores = tt_svd_stack(to_sites(x, order), bond)
    return from_sites(contract_stack(cores), order, shape), sum(core[0].numel() for core in cores)


def _images(data: Data, request: ImageStatesRequest) -> tuple[str, Tensor]:
    """A seeded choice of images of the test split, or of the first."""
    split = "test" if "test" in data.splits else next(iter(data.splits))
    examples = data.splits[split]
    generator = torch.Generator().manual_seed(derived_seed(request.seed, NAME))
    count = _QUICK_IMAGES if request.quick else _IMAGES
    chosen = torch.randperm(len(examples), generator=generator)[:count]
    return split, examples.batch(chosen)["x"].double() / 255


def _quality(x: Tensor, order: str, bond: int) -> Quality:
    errors, numbers = [], 0
    for part in x.split(_AT_ONCE):
        image, numbers = approximate(part, order, bond)
        errors.append((image - part).square().flatten(1).mean(1))
    return _decibels(numbers, bond, torch.cat(errors))


def _entropies(x: Tensor, order: str) -> Tensor:
    return torch.cat([entropies(to_sites(part, order)) for part in x.split(_AT_ONCE)])


def _peers(x: Tensor, sizes: list[int]) -> dict[str, tuple[Quality, ...]]:
    """The quality of each other method at these sizes.

    A rank costs a column and a row; a coefficient at a place of its own costs its value and its place, at a
    place common to all images its value.
    """
    pixels, rank = x[0].numel(), x.shape[1] * x.shape[2] + x.shape[3]
    own, common = cosine_errors(x)
    methods = {"svd": (low_rank_errors(x), rank), "dct-own": (own, 2), "dct-common": (common, 1)}
    qualities: dict[str, tuple[Quality, ...]] = {}
    for name, (errors, cost) in methods.items():
        kept = [min(size // cost, errors.shape[1] - 1) for size in sizes]
        qualities[name] = tuple(_decibels(k * cost, k, errors[:, k] / pixels) for k in kept)
    return qualities


def _decibels(numbers: int, kept: int, errors: Tensor) -> Quality:
    """The quality for mean squared errors (n,), one per image."""
    errors = errors.clamp(min=_ROUNDING)
    each = -10 * errors.log10()
    sigma = float(each.std()) if len(each) > 1 else 0.0
    return Quality(numbers, kept, float(each.mean()), sigma, float(-10 * errors.mean().log10()))
