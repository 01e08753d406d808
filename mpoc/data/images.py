"""From stored pixels to a network's input: resize, pad-crop-flip, normalise; a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpoc.errors import UsageError


@dataclass(frozen=True)
class ImageOptions:
    """What is done to images; plain data, so that it can be recorded.  Lists are taken for tuples."""

    mean: tuple[float, ...] = (0.0,)  # per channel, or one for all; of pixels in [0, 1]
    std: tuple[float, ...] = (1.0,)
    pad: int = 0  # training: pad by so many black pixels, crop at a random place
    flip: bool = False  # training: left and right exchanged, every second image on average
    size: tuple[int, int] | None = None  # (height, width) to resize to; None: as they are

    def __post_init__(self) -> None:
        for name in ("mean", "std", "size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise UsageError(f"{len(self.mean)} means but {len(self.std)} standard deviations")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise UsageError(f"means {self.mean}, standard deviations {self.std}: must be finite")
        if not self.mean or not self.std or min(self.std) <= 0:
            raise UsageError(
                f"standard deviations {self.std}: each must be above 0, one a channel or one for all"
            )
        if self.pad < 0 or (self.size is not None and (len(self.size) != 2 or min(self.size) < 1)):
            raise UsageError(f"pad {self.pad}, size {self.size}: pad from 0, size as (height, width) from 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain data; ``ImageOptions(**options.as_dict())`` is the same again."""
        return asdict(self)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The (C, H, W) that :func:`prepare` makes of (C, H, W)."""
        return (shape[0], *self.size) if self.size else tuple(shape)


def prepare(x: Tensor, options: ImageOptions, generator: torch.Generator | None = None) -> Tensor:
    """A batch of images as the network takes it.

    Args:
        x: (n, C, H, W) uint8.
        options: what to do.
        generator: gives the random crops and flips of training; None for evaluation, which has none.

    Returns:
        (n, C, H', W') float32, (pixel/255 − mean)/std, where x is.

    Raises:
        UsageError: as many means as the images have channels are needed, or one.
    """
    channels = x.shape[1]
    for name, values in (("means", options.mean), ("standard deviations", options.std)):
        if len(values) not in (1, channels):
            raise UsageError(f"{len(values)} {name} for images of {channels} channels")
    if options.size and tuple(x.shape[2:]) != options.size:
        x = F.interpolate(x.float(), options.size, mode="bilinear", antialias=True)
    if generator is not None and options.pad:
        x = _crop(x, options.pad, generator)
    if generator is not None and options.flip:
        flips = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
        x = torch.where(flips.to(x.device)[:, None, None, None], x.flip(3), x)
    mean, std = _planes(options.mean, x.device), _planes(options.std, x.device)
    return x.float().div_(255).sub_(mean).div_(std) if x.dtype == torch.uint8 else (x / 255 - mean) / std


@lru_cache(maxsize=16)
def _planes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32; kept, as every batch needs the same."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _crop(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image padded with zeros by ``pad`` on all sides, then cut to its size at a random place."""
    n, _, height, width = x.shape
    places = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=generator.device).to(x.device)
    windows = (
        F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    )  # (n, C, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(n, device=x.device), :, places[0], places[1]]
