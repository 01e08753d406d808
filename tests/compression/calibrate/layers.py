"""A small layer's weight, and what is known of its inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.compression.calibrate.moments import Accumulator, Moments
from mpoc.compression.calibrate.objective import LayerObjective, Objective

SIDES = (16, 24)


def moments(seed: int, count: int = 300) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    sums = Accumulator()
    sums.add(torch.randn(count, SIDES[1], generator=generator, dtype=torch.float64).cumsum(1) + 0.3)
    return sums.moments()


def known(centred: bool = True, weighed: bool = True) -> Objective:
    probes = torch.randn(40, SIDES[0], generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return LayerObjective(moments(0), moments(1), probes.T @ probes / 40 if weighed else None, centred)


def weight(seed: int) -> Tensor:
    return torch.randn(SIDES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
