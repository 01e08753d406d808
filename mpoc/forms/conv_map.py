"""A convolution as one linear map, and back: kernel ↔ (H'·W'·C_out, H·W·C_in), channel last on both sides.

    W_map = Σ_ab S_a ⊗ S_b ⊗ K[a, b]

The shift S_a joins output and input positions of tap a along an axis; stride, padding and dilation are in it.
Groups make K[a, b] block diagonal.  Two taps never join the same pair of positions unless padding repeats
inputs, so the kernel nearest to any map (least squares) is the average over the positions where a tap acts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from mpoc.geometry import Geometry


def shift_matrices(geometry: Geometry, axis: int) -> Tensor:
    """(k, N', N) of ones and zeros, float64: one shift for each tap along ``axis``."""
    taps = geometry.shifts(axis)
    shifts = torch.zeros(len(taps), geometry.output_size[axis], geometry.size[axis], dtype=torch.float64)
    for tap, pairs in enumerate(taps):
        for output, position in pairs:
            shifts[tap, output, position] = 1.0
    return shifts


def full_taps(kernel: Tensor, geometry: Geometry) -> Tensor:
    """(C_out, C_in / groups, k, …) → (taps, C_out, C_in): groups spelt out with zeros."""
    taps = kernel.flatten(2).permute(2, 0, 1)
    if geometry.groups == 1:
        return taps
    blocks = taps.unflatten(1, (geometry.groups, -1))  # (taps, groups, C_out / groups, C_in / groups)
    return torch.stack([torch.block_diag(*tap) for tap in blocks])


def from_full_taps(taps: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`full_taps`: what lies outside the groups' blocks is dropped."""
    if geometry.groups > 1:
        blocks = taps.unflatten(2, (geometry.groups, -1)).unflatten(1, (geometry.groups, -1))
        taps = torch.einsum("tgogi->tgoi", blocks).flatten(1, 2)
    return taps.permute(1, 2, 0).unflatten(2, geometry.kernel_size).contiguous()


def map_of_kernel(kernel: Tensor, geometry: Geometry) -> Tensor:
    """The dense map (H'·W'·C_out, H·W·C_in) of a kernel (C_out, C_in / groups, k, …), in its dtype."""
    taps = full_taps(kernel, geometry)
    outputs, inputs = geometry.positions
    dense = taps.new_zeros(outputs, taps.shape[1], inputs, taps.shape[2])
    for tap, (output, position) in zip(taps, _pairs(geometry, kernel.device), strict=True):
        dense[output, :, position, :] += tap
    return dense.flatten(0, 1).flatten(1)


def nearest_kernel(matrix: Tensor, geometry: Geometry) -> Tensor:
    """The kernel whose map is nearest to ``matrix`` (H'·W'·C_out, H·W·C_in) in Frobenius norm.

    A tap that acts nowhere (its kernel reaches only into padding) is zero.
    """
    outputs, inputs = geometry.positions
    dense = matrix.unflatten(0, (outputs, -1)).unflatten(2, (inputs, -1))
    pairs = _pairs(geometry, matrix.device)
    sums = torch.stack([dense[output, :, position, :].sum(0) for output, position in pairs])
    return from_full_taps(solve_for_taps(sums, geometry), geometry)


def solve_for_taps(sums: Tensor, geometry: Geometry) -> Tensor:
    """Least squares from ⟨S_a ⊗ S_b, map⟩ (taps, C_out, C_in) to the kernel's taps.

    The normal matrix ⟨S_a ⊗ S_b, S_c ⊗ S_d⟩ counts positions; it is diagonal unless padding repeats inputs.
    """
    shifts = (shift_matrices(geometry, axis).flatten(1) for axis in range(len(geometry.size)))
    inverse = reduce(torch.kron, (torch.linalg.pinv(s @ s.T, hermitian=True) for s in shifts))
    return torch.einsum("ts,soi->toi", inverse.to(sums.device), sums.double()).to(sums.dtype)


def _pairs(geometry: Geometry, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """For each tap, last axis fastest: the flat output and input positions that it joins."""
    axes = range(len(geometry.size))
    for taps in itertools.product(*(geometry.shifts(axis) for axis in axes)):
        joined = list(itertools.product(*taps))
        flat = [
            [_flat([pair[side] for pair in place], size) for place in joined]
            for side, size in ((0, geometry.output_size), (1, geometry.size))
        ]
        output, position = torch.tensor(flat, dtype=torch.int64, device=device).unbind()
        yield output, position


def _flat(index: list[int], size: tuple[int, ...]) -> int:
    return sum(n * math.prod(size[axis + 1 :]) for axis, n in enumerate(index))
