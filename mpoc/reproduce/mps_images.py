"""Images themselves as matrix product states: how few numbers hold them how well.

The outlook of Gao et al. 2020 after Latorre, arXiv:quant-ph/0510031.  Nothing is trained: some images of a
set become states of two orders of their pixels at several bonds, beside what is usual for as many numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc.data import Data, open_data
from mpoc.errors import UsageError
from mpoc.reproduce.image_states import (
    contract_stack,
    cosine_errors,
    entropies,
    low_rank_errors,
    tt_svd_stack,
)
from mpoc.reproduce.pixels import ORDERS, from_sites, to_sites
from mpoc.train.settings import derived_seed
from mpoc.train.watch import short

NAME = "mps-images"
SOURCE = "outlook of Gao et al. 2020, after Latorre, arXiv:quant-ph/0510031"
SCHEMA = "mpoc.image-states/1"
BONDS = (1, 2, 3, 4, 6, 8, 12, 16)
_IMAGES, _QUICK_IMAGES = 1000, 100
_AT_ONCE = 250  # images of a stack
# Of 8-bit pixels: an error below that of rounding to them counts as that, 58.9 dB, else exact images would
# make every mean infinite.
_ROUNDING = 1 / (12 * 255**2)


@dataclass(frozen=True)
class Request:
    """What is asked for."""

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
    """What was found."""

    data: Data
    split: str
    images: Tensor  # (n, C, H, W) float64 from 0 to 1
    states: dict[str, tuple[Quality, ...]]  # by order, one a bond
    peers: dict[str, tuple[Quality, ...]]  # by method, each the best of it that the same numbers hold
    entropies: dict[str, tuple[float, ...]]  # by order, mean over the images at every bond
    quick: bool

    @property
    def pixels(self) -> int:
        """Numbers of an image as it is."""
        return self.images[0].numel()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; README documents it."""
        return {
            "schema": SCHEMA,
            "experiment": NAME,
            "source": SOURCE,
            "data": self.data.announce(),
            "measured": self.split,
            "images": len(self.images),
            "numbers_of_an_image": self.pixels,
            "quick": self.quick,
            "states": {name: [_as_dict(at) for at in found] for name, found in self.states.items()},
            "peers": {name: [_as_dict(at) for at in found] for name, found in self.peers.items()},
            "entropies": {name: list(map(short, found)) for name, found in self.entropies.items()},
        }


def _as_dict(at: Quality) -> dict[str, float]:
    found = {name: short(getattr(at, name)) for name in ("decibels", "sigma", "of_mean_error")}
    return {"numbers": at.numbers, "kept": at.kept, **found}


def measure_images(request: Request, say: Callable[[str], None]) -> ImageStates:
    """Make the states, and measure them and their peers.

    Args:
        request: what.
        say: gets messages.

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
    """Images through states at one bond.

    Args:
        x: (n, C, H, W).
        order: of the pixels.
        bond: cap on every D_k.

    Returns:
        The same shape, and the numbers of one state.
    """
    shape = (x.shape[1], x.shape[2], x.shape[3])
    cores = tt_svd_stack(to_sites(x, order), bond)
    return from_sites(contract_stack(cores), order, shape), sum(core[0].numel() for core in cores)


def _images(data: Data, request: Request) -> tuple[str, Tensor]:
    """A seeded choice of the test images, or of the only split's."""
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
    """What each method makes of the images in at most so many numbers.

    A rank costs a column and a row; a coefficient at a place of its own costs its value and its place, at a
    place common to all images its value.
    """
    pixels, rank = x[0].numel(), x.shape[1] * x.shape[2] + x.shape[3]
    own, common = cosine_errors(x)
    methods = {"svd": (low_rank_errors(x), rank), "dct-own": (own, 2), "dct-common": (common, 1)}
    found: dict[str, tuple[Quality, ...]] = {}
    for name, (errors, cost) in methods.items():
        kept = [min(size // cost, errors.shape[1] - 1) for size in sizes]
        found[name] = tuple(_decibels(k * cost, k, errors[:, k] / pixels) for k in kept)
    return found


def _decibels(numbers: int, kept: int, errors: Tensor) -> Quality:
    """Of mean squared errors (n,), one an image."""
    errors = errors.clamp(min=_ROUNDING)
    each = -10 * errors.log10()
    sigma = float(each.std()) if len(each) > 1 else 0.0
    return Quality(numbers, kept, float(each.mean()), sigma, float(-10 * errors.mean().log10()))
