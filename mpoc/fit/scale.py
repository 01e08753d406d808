"""Weights of any size brought to about 1 and back by powers of two: float32 cannot square 1e-40, nor 1e38."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Between 2⁻⁴⁰ and 2⁴⁰ squares, and sums of them, keep all their digits.
_PLAIN = 40


def largest(tensor: Tensor) -> float:
    """max |x|, in one pass; NaN or infinite where an entry is, 0 of no entry."""
    ends = torch.aminmax(tensor) if tensor.numel() else ()
    return max((abs(float(end)) for end in ends), default=0.0)


def exponent_of(tensor: Tensor) -> int:
    """e such that the largest entry is below 2ᵉ, and not below 2ᵉ⁻¹; 0 where no scaling is needed."""
    most = largest(tensor)
    exponent = math.frexp(most)[1] if math.isfinite(most) else 0
    return exponent if abs(exponent) > _PLAIN else 0


def scaled(tensor: Tensor, exponent: int) -> Tensor:
    """2ᵉ · tensor, in two steps: 2ᵉ itself may have no float32."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half) if exponent else tensor


def spread(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Cores of 2ᵉ times the weight, each taking an equal part of e."""
    share, rest = divmod(exponent, len(cores))
    return [scaled(core, share + (k < rest)) for k, core in enumerate(cores)]
