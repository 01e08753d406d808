"""Random orthogonal cores of a MERA: what Hallam et al. 2017 start their layers from (Saxe et al. 2013)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoc.structure import Structure


def orthogonal_cores(structure: Structure, bond: int, generator: torch.Generator) -> list[Tensor]:
    """Each core as a matrix (upper legs, lower legs) drawn by the Haar measure, float64.

    A core with more upper legs' numbers than lower is an isometry, else the transpose of one; scaled so that
    the variance of what goes through it stays what it is.

    Args:
        structure: its network is ``mera``.
        bond: D.
        generator: on the CPU.
    """
    cores = []
    for shape in structure.core_shapes(structure.bonds(bond)):
        half = len(shape) // 2
        upper, lower = math.prod(shape[:half]), math.prod(shape[half:])
        matrix = haar(max(upper, lower), min(upper, lower), generator) * math.sqrt(max(1.0, upper / lower))
        cores.append((matrix if upper >= lower else matrix.T).reshape(shape))
    return cores


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) with orthonormal columns, uniformly distributed; float64.

    Source: Mezzadri, Notices of the AMS 54, 592 (2007): QR of a normal matrix, R's diagonal made positive.
    """
    orthonormal, upper = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return orthonormal * upper.diagonal().sign()
