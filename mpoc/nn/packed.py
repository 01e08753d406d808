"""Layers that hold codes instead of weights, and turn them into numbers block by block as they are used.

A grid takes b/8 bytes a weight, in planes of bits; a coded matrix is held as int8 or int16 codes. The
trade-off: every call decodes again, so a call takes longer, and the weights are not trained. Cores are
decoded whole, since they are small; other modules (an LSTM, attention) keep their dense weights.

Products are taken with the codes as they are, in float32: steps of columns go into the input, those of rows
and the zero points into the output. A weight then costs little more than its conversion to a float.

Scales are held as bits, so that ``half()`` and ``to(torch.bfloat16)`` change what is computed with and not
what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mpoc.nn.conv import (
    MPOConv1d,
    MPOConv2d,
    MPOConv3d,
    MPOConvTranspose1d,
    MPOConvTranspose2d,
    MPOConvTranspose3d,
)
from mpoc.nn.weight import renew
from mpoc.quantize.codes import HALF_OCTAVES, GridTensor, QuantizedTensor
from mpoc.quantize.packing import from_planes, to_planes
from mpoc.tensor_networks.forms.layout import from_matrix
from mpoc.tensor_networks.structure import Structure

# Numbers of a product that are decoded at a time.
_BLOCK = 1 << 20
# Vectors up to which torch's kernel of int8 codes is faster than a product with decoded blocks.
_FEW = 8
_WHOLE = 32  # columns that it reads at once, at most


class PackedMatrix(nn.Module):
    """A matrix (rows, columns) of codes.

    Args:
        quantized: the codes.
        dtype: of the numbers that are computed with; ``to`` changes it.
    """

    codes: Tensor  # planes of a grid, or (rows, columns) of integers
    steps: Tensor  # bits of the scales (rows, groups), or of the one scale
    zero_points: Tensor | None  # planes along the rows, (groups, bytes)
    row_exponents: Tensor
    column_exponents: Tensor
    like: Tensor  # has the dtype of the numbers

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = quantized.codes.shape
        self.shape = rows, columns
        self.grid = quantized.spec if isinstance(quantized, GridTensor) else None
        held: dict[str, Tensor | None]
        if isinstance(quantized, GridTensor):
            bits, zeros = quantized.spec.bits, quantized.zero_point
            held = {"codes": to_planes(quantized.codes, bits)}
            held["zero_points"] = None if zeros is None else to_planes(zeros.T, bits)
            held["steps"] = quantized.scale.view(torch.int16)
        else:
            held = {"codes": quantized.codes, "row_exponents": quantized.row_exponents}
            held["column_exponents"] = quantized.column_exponents
            held["steps"] = torch.tensor([quantized.scale]).view(torch.int32)
        for name, tensor in held.items():
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """The product of ``x`` (…, columns) with the transposed matrix: (…, rows) of x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.grid is None:
            by_row, by_column = self._sides()
            if self._has_kernel(x):
                rows = (wide * by_column).to(x.dtype).reshape(-1, self.shape[1]).contiguous()
                y = torch._weight_int8pack_mm(rows, self.codes, by_row.to(x.dtype))
                return y.reshape(*x.shape[:-1], self.shape[0])
            return (self._times_codes(wide * by_column) * by_row).to(x.dtype)
        y = self._times_codes(wide)
        sums = wide.unflatten(-1, (self.steps.shape[1], -1)).sum(-1)
        return (y - linear(sums, (self._zeros() * self._scales()).to(wide.dtype))).to(x.dtype)

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether torch multiplies int8 codes faster: bfloat16, on a CPU, few vectors (measured).

        It reads whole vectors of columns, and beyond the end of others.
        """
        few = x.dtype == torch.bfloat16 and x.numel() <= _FEW * self.shape[1] and self.shape[1] % _WHOLE == 0
        return few and x.is_cpu and self.codes.dtype == torch.int8 and not x.requires_grad

    def _times_codes(self, x: Tensor) -> Tensor:
        """``x`` times the transposed codes, on a grid times the scales of their groups."""
        rows, columns = self.shape
        step = max(1, _BLOCK // columns)
        room = x.new_empty(0 if x.requires_grad else min(step, rows), columns)  # autograd keeps every block
        found = []
        for start in range(0, rows, step):
            codes = self._codes(slice(start, start + step))
            block = room[: len(codes)].copy_(codes) if len(room) else codes.to(x.dtype)
            if self.grid is not None:
                scales = self._scales(slice(start, start + step))
                block.unflatten(1, (scales.shape[1], -1)).mul_(scales[:, :, None])
            found.append(linear(x, block))
        return torch.cat(found, dim=-1)

    def values(self, at: slice | Tensor = slice(None)) -> Tensor:
        """The numbers of some rows, (n, columns)."""
        codes = self._codes(at)
        if self.grid is not None:
            zeros = None if self.zero_points is None else self._zeros(at)
            steps = self.steps[at].view(torch.float16)
            return GridTensor(codes, steps, zeros, self.grid).values().to(self.like.dtype)
        by_row, by_column = self._sides()
        return codes.float().mul_(by_row[at, None]).mul_(by_column).to(self.like.dtype)

    def _codes(self, at: slice | Tensor) -> Tensor:
        """Codes of some rows, (n, columns)."""
        if self.grid is None:
            return self.codes[at]
        return from_planes(self.codes[at], self.grid.bits, self.shape[1])

    def _scales(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Scales of some rows of a grid, (n, groups) of float32."""
        return self.steps[at].view(torch.float16).float()

    def _zeros(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Zero points of some rows of a grid, (n, groups) of uint8."""
        assert self.grid is not None
        if self.zero_points is None:
            return torch.full_like(self.steps[at], self.grid.levels // 2, dtype=torch.uint8)
        return from_planes(self.zero_points, self.grid.bits, self.shape[0]).T[at]

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Steps of the rows, the scale in them, and of the columns of a coded matrix, in float32."""
        octaves = HALF_OCTAVES.to(self.codes.device)
        rows, columns = octaves[self.row_exponents.long()], octaves[self.column_exponents.long()]
        return rows * self.steps.view(torch.float32), columns

    def parameter(self, made: Tensor) -> nn.Parameter:
        """``made`` of these codes as a parameter, the same for all layers that share them."""
        shared: nn.Parameter = vars(self).setdefault("shared", nn.Parameter(made))
        return shared


class PackedCores(nn.ModuleList):
    """The cores of a layer, each decoded whenever it is read.

    Args:
        matrices: the codes of each core.
        shapes: the shapes of the cores.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(matrices)
        self.shapes = tuple(shapes)

    def __getitem__(self, at: Any) -> Any:
        """A core as a tensor."""
        matrix: Any = super().__getitem__(at)
        return matrix.values().reshape(self.shapes[at])

    def __iter__(self) -> Iterator[Any]:
        """All cores."""
        return (self[at] for at in range(len(self)))

    def unpacked(self) -> nn.ParameterList:
        """The cores as parameters."""
        pairs = zip(self._modules.values(), self, strict=True)
        return nn.ParameterList(matrix.parameter(core) for matrix, core in pairs)  # type: ignore[operator]


class PackedWeight(nn.Module):
    """A module whose ``weight`` is decoded when it is read; made by :func:`pack_weight`."""

    packed: PackedMatrix
    structure: Structure  # how the matrix becomes the weight
    bias: Any

    weight: Any = property(lambda layer: layer.dense_weight())

    def dense_weight(self) -> Tensor:
        """The weight in its own shape."""
        return from_matrix(self.packed.values()[None], self.structure)

    def unpack(self) -> None:
        """Hold the weight as a parameter again, as the module that this was."""
        weight = self.packed.parameter(self.dense_weight())
        del self.packed
        self.__class__ = vars(self).pop("plain")
        self.register_parameter("weight", weight)


class PackedLinear(PackedWeight, nn.Linear):
    """``nn.Linear`` of codes; block by block of its outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        y = self.packed.product(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedConv1D(PackedWeight):
    """transformers' ``Conv1D`` of codes."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, nx) → (…, nf)."""
        y = self.packed.product(x)
        return y + self.bias.to(y.dtype)


class PackedEmbedding(PackedWeight, nn.Embedding):
    """``nn.Embedding`` of codes; only the rows that are looked up are decoded."""

    def forward(self, input: Tensor) -> Tensor:
        """(…) → (…, embedding_dim)."""
        return self.packed.values(input.reshape(-1)).reshape(*input.shape, self.embedding_dim)


class PackedConv1d(PackedWeight, nn.Conv1d):
    """``nn.Conv1d`` of codes."""

    forward = MPOConv1d.forward


class PackedConv2d(PackedWeight, nn.Conv2d):
    """``nn.Conv2d`` of codes."""

    forward = MPOConv2d.forward


class PackedConv3d(PackedWeight, nn.Conv3d):
    """``nn.Conv3d`` of codes."""

    forward = MPOConv3d.forward


class PackedConvTranspose1d(PackedWeight, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` of codes."""

    forward = MPOConvTranspose1d.forward


class PackedConvTranspose2d(PackedWeight, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` of codes."""

    forward = MPOConvTranspose2d.forward


class PackedConvTranspose3d(PackedWeight, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` of codes."""

    forward = MPOConvTranspose3d.forward


_PACKED: dict[type[nn.Module], type[PackedWeight]] = {
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
}


def pack_weight(module: nn.Module, name: str, matrix: PackedMatrix, structure: Structure) -> bool:
    """Replace the dense weight of a module by its codes, in place; False: the module keeps it.

    Args:
        module: holds the weight.
        name: of the weight within the module.
        matrix: the codes.
        structure: how their matrix becomes the weight.
    """
    cls = type(module)
    is_conv1d = cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"
    packed = PackedConv1D if is_conv1d else _PACKED.get(cls)
    if packed is None or name != "weight" or structure.transposed != is_conv1d:
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    del module._parameters[name]
    module.__class__ = packed
    module.__dict__.update(structure=structure, plain=cls)
    module.packed = matrix
    return True


def pack_cores(module: nn.Module, name: str, cores: PackedCores) -> None:
    """Replace the cores ``name`` of a module by their codes, in place."""
    delattr(module, name)
    setattr(module, name, cores)
    module.__dict__["_weights"] = "cores"
    renew(module)
