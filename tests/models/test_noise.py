"""Noise has the spectrum that it is said to have, and pixels and signals the ranges of natural ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpoc.models import noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32), (1, 1024)], ids=str)
def test_spectral_noise_falls_as_a_power_law(shape: tuple[int, ...]) -> None:
    """The slope of log power by log frequency, over all examples, is twice the mean exponent, 1.2."""
    x = noise.spectral(200, shape, seeded())
    axes = tuple(range(2, x.dim()))
    torch.testing.assert_close(x.mean(axes), torch.zeros(200, shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(axes), torch.ones(200, shape[0]))
    power = torch.fft.fft(x, dim=-1).abs().square().flatten(0, -2)
    frequency = torch.arange(2, shape[-1] // 4).double()
    mean = power[:, 2 : shape[-1] // 4].double().log().mean(0)
    matrix = torch.stack([frequency.log(), torch.ones_like(frequency)], 1)
    slope = float(torch.linalg.lstsq(matrix, mean[:, None]).solution[0])
    along_one_axis = -2.4 if len(shape) == 2 else -1.5  # summed over the other axis it is flatter
    assert abs(slope - along_one_axis) < 0.35


def test_dead_leaves_have_edges() -> None:
    """Differences of neighbours have far heavier tails than those of noise of one spectrum."""

    def kurtosis(x: torch.Tensor) -> float:
        steps = x.diff(dim=-1).flatten()
        return float((steps / steps.std()).pow(4).mean())

    assert kurtosis(noise.dead_leaves(20, (1, 32, 32), seeded())) > 8
    assert kurtosis(noise.spectral(20, (1, 32, 32), seeded())) < 6


def test_images_are_pixels_of_any_shape() -> None:
    colour = noise.noise_images(40, (3, 16, 24), seeded())
    assert (colour.shape, colour.dtype) == ((40, 3, 16, 24), torch.uint8)
    values = colour / 255
    assert 0.4 < float(values.mean()) < 0.6 and 0.15 < float(values.std()) < 0.35
    pixels = values.transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(pixels)[0, 1:].min()) > 0.6  # channels go together, as in photographs
    grey = noise.noise_images(40, (1, 28, 28), seeded())
    assert float((grey == 0).float().mean()) > 0.4  # strokes on black
    assert bool((grey.flatten(1).max(1).values > 200).all())


def test_waveforms_are_tones_that_come_and_go() -> None:
    x = noise.waveforms(8, 8000, seeded())
    torch.testing.assert_close(x.mean(1), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(8))
    loudness = x.view(8, 20, 400).square().mean(2)
    assert bool((loudness.max(1).values > 2 * loudness.min(1).values).all())


@pytest.mark.parametrize("make", [noise.noise_images, noise.waveforms], ids=["images", "waveforms"])
def test_noise_is_deterministic(make: Any) -> None:
    size = (1, 8, 8) if make is noise.noise_images else 100
    first, again, other = (make(3, size, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
