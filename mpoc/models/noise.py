"""Images and signals made of noise, whose statistics are those of natural ones as far as one formula goes.

Dead leaves are opaque shapes that cover one another, of all sizes by the law of areas 1 / r³ (Lee, Mumford
and Huang, "Occlusion models for natural images", IJCV 2001): they have edges, flat regions and occlusion.
Noise of amplitude 1 / f^α has the spectrum of natural images (Field 1987) and nothing else of them.  Strokes
stand for writing.  Waveforms are harmonics of gliding pitch whose loudness varies a few times a second, as
speech and music do, over noise of 1 / f.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

_LEAVES = 64  # of an image
_SMALLEST, _LARGEST = 0.06, 0.6  # radii of leaves, in sides of the image
_STROKES, _STEPS = 3, 24  # of an image of writing; points of a stroke
_AT_ONCE = 1 << 22  # numbers of images that are painted together
_HARMONICS = 12


def noise_images(count: int, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """Images (count, C, H, W) uint8: dead leaves with texture, a quarter of them 1/f noise.

    Of grey images three quarters are strokes on black.
    """
    part = max(1, _AT_ONCE // math.prod(shape))
    sizes = [min(part, count - start) for start in range(0, count, part)]
    return torch.cat([_painted(size, shape, generator) for size in sizes])


def _painted(count: int, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    channels, height, width = shape
    light = spectral(count, (1, height, width), generator)
    tint = spectral(count, (channels, height, width), generator) if channels > 1 else torch.zeros(())
    texture = 0.25 * _uniform(count, 4, generator).square() * (light + 0.3 * tint)
    contrast = 0.08 + 0.2 * _uniform(count, 4, generator)
    clouds = _colours(count, channels, generator, 0.15, 0.05) + contrast * (light + 0.35 * tint)
    images = torch.where(
        _uniform(count, 4, generator) < 0.25, clouds, dead_leaves(count, shape, generator) + texture
    )
    if channels == 1:
        written = strokes(count, (height, width), generator)
        images = torch.where(_uniform(count, 4, generator) < 0.75, written, images)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def spectral(count: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Noise (count, C, …) of amplitude 1 / f^α, α of each example in [0.8, 1.6]; mean 0, deviation 1.

    The axes after the channels are space or time.
    """
    sizes, axes = shape[1:], tuple(range(2, 1 + len(shape)))
    squares = [torch.fft.fftfreq(n).square() for n in sizes[:-1]]
    squares.append(torch.fft.rfftfreq(sizes[-1]).square())
    total = squares[0]
    for other in squares[1:]:
        total = total[..., None] + other
    slope = 0.8 + 0.8 * _uniform(count, 1 + len(shape), generator)
    falling = total.sqrt().clamp(min=1 / max(sizes)) ** -slope
    white = torch.fft.rfftn(torch.randn(count, *shape, generator=generator), dim=axes)
    noise = torch.fft.irfftn(white * falling, s=sizes, dim=axes)
    noise = noise - noise.mean(axes, keepdim=True)
    return noise / noise.std(axes, keepdim=True).clamp(min=1e-6)


def dead_leaves(count: int, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """Images (count, C, H, W), pixels about [0, 1]: ellipses and blocks in any direction over one another."""
    channels, height, width = shape
    side = max(height, width)
    y, x = torch.arange(height)[:, None] / side, torch.arange(width) / side
    images = _colours(count, channels, generator).expand(count, channels, height, width)
    for _ in range(_LEAVES):
        u, angle, flat, down, right = (_uniform(count, 3, generator) for _ in range(5))
        radius = (_LARGEST**-2 + u * (_SMALLEST**-2 - _LARGEST**-2)) ** -0.5
        dy, dx, angle = y - down * height / side, x - right * width / side, angle * math.pi
        along = dx * angle.cos() + dy * angle.sin()
        across = (dy * angle.cos() - dx * angle.sin()) / (0.35 + 0.65 * flat)
        power = torch.where(_uniform(count, 3, generator) < 0.5, 2.0, 8.0)
        distance = (along.abs() ** power + across.abs() ** power) ** (1 / power)
        covers = ((radius - distance) * side + 0.5).clamp(0, 1)[:, None]  # of a pixel, a share at the edge
        slope = 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
        leaf = _colours(count, channels, generator) + slope * (along / radius)[:, None]
        images = torch.lerp(images, leaf, covers)
    return images


def strokes(count: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Images (count, 1, H, W) in [0, 1]: a few bright, bent strokes in the middle of a black image."""
    height, width = size
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    thick = 0.03 + 0.03 * _uniform(count, 3, generator)  # half a stroke, in sides
    t = torch.linspace(0, 1, _STEPS)[:, None]
    images = torch.zeros(count, height, width)
    used = torch.randint(1, _STROKES + 1, (count, 1, 1), generator=generator)
    for k in range(_STROKES):
        ends = 0.2 + 0.6 * torch.rand(3, count, 1, 2, generator=generator)
        path = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]  # (count, steps, 2)
        nearest = torch.full((count, height, width), math.inf)
        for step in range(_STEPS):
            down, right = (path[:, step, axis, None, None] for axis in (0, 1))
            squared = (y - down * height).square() + (x - right * width).square()
            nearest = torch.minimum(nearest, squared)
        ink = (thick * max(size) - nearest.sqrt() + 0.5).clamp(0, 1)
        images = torch.where(used > k, torch.maximum(images, ink), images)
    return images[:, None]


def waveforms(count: int, length: int, generator: Generator) -> Tensor:
    """Signals (count, length), mean 0 and deviation 1, of 16,000 samples a second: tones over noise."""
    seconds = torch.arange(length) / 16_000
    pitch = 80 * 2 ** (2.5 * _uniform(count, 2, generator))  # Hz
    wobble = 0.05 * torch.sin(2 * math.pi * (0.5 + 3 * _uniform(count, 2, generator)) * seconds)
    phase = 2 * math.pi * pitch * (seconds + wobble / 10)
    tones = torch.zeros(count, length)
    for harmonic in range(1, _HARMONICS + 1):
        rate, start, loud = (_uniform(count, 2, generator) for _ in range(3))
        beat = torch.sin(2 * math.pi * ((1 + 5 * rate) * seconds + start)).clamp(min=0)
        tones += loud * beat * torch.sin(harmonic * phase + 6 * start) / harmonic
    signal = tones + (0.02 + 0.3 * _uniform(count, 2, generator).square()) * spectral(
        count, (1, length), generator
    ).squeeze(1)
    signal = signal - signal.mean(1, keepdim=True)
    return signal / signal.std(1, keepdim=True).clamp(min=1e-6)


def _colours(
    count: int, channels: int, generator: Generator, light: float = 0.25, tint: float = 0.1
) -> Tensor:
    """Colours (count, C, 1, 1) about grey."""
    grey = torch.randn(count, 1, 1, 1, generator=generator)
    return 0.5 + light * grey + tint * torch.randn(count, channels, 1, 1, generator=generator)


def _uniform(count: int, dims: int, generator: Generator) -> Tensor:
    """One number in [0, 1) an example, (count, 1, …, 1) of ``dims`` axes."""
    return torch.rand(count, *[1] * (dims - 1), generator=generator)
