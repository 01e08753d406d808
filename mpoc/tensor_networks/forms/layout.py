"""Convert between a weight as the checkpoint stores it and the interleaved tensor that a form factorises.

    weight → (lead, outputs, inputs) → padded → (lead, J_1..J_n, I_1..I_n) → (J_1, I_1, J_2, I_2, …)

The weight of a whole map is the kernel K, and its matrix the convolution as one linear map, (H'·W'·C_out,
H·W·C_in) with the channel last on both sides:

    W_map = Σ_ab S_a ⊗ S_b ⊗ K[a, b]

The shift S_a joins the output and input positions of tap a along an axis, with stride, padding and dilation.
Groups make K[a, b] block diagonal. The way back takes any map and gives the nearest kernel by least squares:
two taps never join the same pair of positions unless padding repeats inputs, so each tap is an average over
the positions where it acts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoc.tensor_networks.geometry import Geometry
from mpoc.tensor_networks.structure import Structure


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for a float64 weight, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_matrix(weight: Tensor, structure: Structure) -> Tensor:
    """``weight`` as in the checkpoint → (lead, outputs, inputs in their order), a view if possible."""
    if structure.geometry is not None:
        return map_of_kernel(weight, structure.geometry)[None]
    if structure.kind.startswith("conv"):
        taps = weight.flatten(2).permute(2, 0, 1)  # (taps, C_out, C_in)
        return taps.transpose(0, 1).flatten(1)[None] if structure.one_matrix else taps
    blocks = weight.reshape(-1, *weight.shape[-2:])
    blocks = blocks.transpose(1, 2) if structure.transposed else blocks
    matrix = blocks.reshape(structure.lead, structure.outputs, structure.inputs)
    order = input_order(structure, matrix.device)
    return matrix if order is None else matrix[:, :, order]


def from_matrix(matrix: Tensor, structure: Structure) -> Tensor:
    """The inverse of :func:`to_matrix`: (lead, outputs, inputs) → ``structure.shape``, contiguous."""
    if structure.geometry is not None:
        return nearest_kernel(matrix[0], structure.geometry)
    shape = structure.shape
    if structure.kind.startswith("conv"):
        taps = matrix
        if structure.one_matrix:
            taps = matrix[0].unflatten(1, (-1, shape[1])).transpose(0, 1)  # (taps, C_out, C_in)
        return taps.permute(1, 2, 0).reshape(shape).contiguous()
    order = input_order(structure, matrix.device)
    if order is not None:
        matrix = matrix[:, :, order.argsort()]
    if structure.transposed:
        matrix = matrix.reshape(-1, *shape[:-3:-1]).transpose(1, 2)
    return matrix.reshape(shape).contiguous()


def input_order(structure: Structure, device: torch.device | str) -> Tensor | None:
    """The input at each column of the matrix, (N_x,); None: the inputs keep their own order."""
    order = structure.permutation
    return None if order is None else torch.tensor(order, device=device)


def interleave(weight: Tensor, structure: Structure) -> Tensor:
    """``weight`` → contiguous (J_1 I_1, J_2 I_2, …), zero-padded, in the working dtype; one copy."""
    matrix = to_matrix(weight, structure)
    rows, columns = structure.padding
    if rows or columns:
        matrix = pad(matrix, (0, columns, 0, rows))
    tensor = matrix.reshape(_side_by_side(structure)).permute(_interleaving(structure))
    tensor = tensor.to(working_dtype(weight.dtype), memory_format=torch.contiguous_format)
    return tensor.contiguous().reshape(structure.site_sizes)


def deinterleave(tensor: Tensor, structure: Structure) -> Tensor:
    """(J_1 I_1, J_2 I_2, …) → ``structure.shape``, padding cropped: the inverse of :func:`interleave`."""
    return from_matrix(deinterleave_matrix(tensor, structure), structure)


def deinterleave_matrix(tensor: Tensor, structure: Structure) -> Tensor:
    """(J_1 I_1, J_2 I_2, …) → (lead, outputs, inputs), padding cropped."""
    shape = _side_by_side(structure)
    order = _interleaving(structure)
    split = tensor.reshape([shape[axis] for axis in order])
    inverse = [order.index(axis) for axis in range(len(order))]
    matrix = split.permute(inverse).reshape(structure.lead, *structure.padded)
    return matrix[:, : structure.outputs, : structure.inputs]


def unpadded(structure: Structure, device: torch.device) -> Tensor:
    """A boolean tensor (J_1 I_1, …) that is True where an entry belongs to the weight."""
    inside = torch.zeros(structure.lead, *structure.padded, dtype=torch.bool, device=device)
    inside[:, : structure.outputs, : structure.inputs] = True
    tensor = inside.reshape(_side_by_side(structure)).permute(_interleaving(structure))
    return tensor.reshape(structure.site_sizes)


def _side_by_side(structure: Structure) -> tuple[int, ...]:
    """(lead, J_1..J_n, I_1..I_n) without the lead site, as a reshape of (lead, outputs, inputs)."""
    skip = structure.lead_sites
    return (
        structure.lead,
        *structure.output_factors[skip:],
        *structure.input_factors[skip:],
    )


def _interleaving(structure: Structure) -> tuple[int, ...]:
    """The permutation from these axes to lead, J_1, I_1, J_2, I_2, …"""
    count = len(structure.output_factors) - structure.lead_sites
    pairs = ((1 + k, 1 + count + k) for k in range(count))
    return (0, *(axis for pair in pairs for axis in pair))


def shift_matrices(geometry: Geometry, axis: int) -> Tensor:
    """The shift of each tap along ``axis``, (k, N', N) of ones and zeros, float64."""
    taps = geometry.shifts(axis)
    shifts = torch.zeros(len(taps), geometry.output_size[axis], geometry.size[axis], dtype=torch.float64)
    for tap, pairs in enumerate(taps):
        for output, position in pairs:
            shifts[tap, output, position] = 1.0
    return shifts


def full_taps(kernel: Tensor, geometry: Geometry) -> Tensor:
    """(C_out, C_in / groups, k, …) → (taps, C_out, C_in), with zeros outside the groups' blocks."""
    taps = kernel.flatten(2).permute(2, 0, 1)
    if geometry.groups == 1:
        return taps
    blocks = taps.unflatten(1, (geometry.groups, -1))  # (taps, groups, C_out / groups, C_in / groups)
    return torch.stack([torch.block_diag(*tap) for tap in blocks])


def from_full_taps(taps: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`full_taps`; entries outside the groups' blocks are dropped."""
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

    A tap that reads only padding is zero.
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
    """The flat output and input positions that each tap joins, last axis fastest."""
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
