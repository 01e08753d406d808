"""Tolerances that follow from the arithmetic, so that they hold on every processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(terms: int, depth: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of sums of ``terms`` products, ``depth`` of them one after the other, with room.

    Rounding errors of n products in an order that the processor chooses add up as √n ε.
    """
    return 4 * depth * math.sqrt(terms) * torch.finfo(dtype).eps


def assert_near(
    found: Tensor, wanted: Tensor, terms: int, depth: int = 1, dtype: torch.dtype = torch.float32
) -> None:
    """Elements differ by no more than rounding of ``dtype``, measured by the largest of ``wanted``."""
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert difference <= rounding(terms, depth, dtype) * largest, (
        f"{difference} where the largest is {largest}"
    )
