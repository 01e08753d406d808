"""A matrix in integer codes: what rounding returns, what goes into the file, and back to numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mpoc.errors import MpocError, shortened
from mpoc.quantize.coding import MOST_EXPONENT, decode, encode
from mpoc.quantize.packing import pack, unpack
from mpoc.quantize.storage import Coded, Grid, Storage, packed_words

# Endings of the names in a file, of a tensor ``X.weight`` or ``X.cores.k``.
PACKED, SCALE, ZERO_POINT, SHAPE, CODED = "_packed", "_scale", "_zero_point", "_shape", "_coded"
# √2^e for every exponent e.
HALF_OCTAVES = torch.tensor([math.sqrt(2.0) ** (e % 2) * 2.0 ** (e // 2) for e in range(MOST_EXPONENT + 1)])


@dataclass(frozen=True, eq=False)
class GridTensor:
    """Codes of a fixed width: value = (code − zero point) · scale, both of the column's group."""

    codes: Tensor  # (rows, columns) of uint8
    scale: Tensor  # (rows, groups) of float16
    zero_point: Tensor | None  # (rows, groups) of uint8; None of a symmetric grid
    spec: Grid

    def values(self) -> Tensor:
        """The numbers, (rows, columns) of float32."""
        rows, groups = self.scale.shape
        zero = self.spec.levels / 2 if self.zero_point is None else self.zero_point.float()[:, :, None]
        grouped = self.codes.view(rows, groups, -1).float()
        return grouped.sub_(zero).mul_(self.scale.float()[:, :, None]).view(self.codes.shape)

    def steps(self) -> Tensor:
        """Distance of neighbouring values, (rows, columns) of float32."""
        group = self.codes.shape[1] // self.scale.shape[1]
        return self.scale.float().repeat_interleave(group, dim=1)

    def lowest(self) -> Tensor:
        """Lowest multiple of its step that each number can be, (rows, columns) of int16."""
        if self.zero_point is None:
            return torch.full_like(self.codes, -self.spec.levels // 2, dtype=torch.int16)
        group = self.codes.shape[1] // self.scale.shape[1]
        return -self.zero_point.short().repeat_interleave(group, dim=1)

    def of_multiples(self, multiples: Tensor) -> GridTensor:
        """The matrix of other multiples of the steps, (rows, columns), which the grid has."""
        return replace(self, codes=(multiples - self.lowest()).to(torch.uint8))

    @property
    def nbytes(self) -> int:
        """Bytes in the file, of all tensors."""
        return self.spec.stored_bytes(*self.codes.shape)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        found = {
            name + PACKED: pack(self.codes, self.spec.bits),
            name + SCALE: self.scale,
            name + SHAPE: torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            found[name + ZERO_POINT] = pack(self.zero_point.T, self.spec.bits).T.contiguous()
        return found

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], name: str, spec: Grid, shape: tuple[int, int]
    ) -> GridTensor:
        """Undo :meth:`tensors`.

        Args:
            tensors: at least those of this matrix.
            name: as given to :meth:`tensors`.
            spec: the grid.
            shape: (rows, columns).

        Raises:
            MpocError: a tensor is missing or has another dtype or shape than follows from grid and shape, or
                the scales are not finite and non-negative.
        """
        rows, columns = shape
        groups = spec.groups(columns)
        stored = _checked(tensors, name + SHAPE, torch.int64, (2,))
        if tuple(stored.tolist()) != shape:
            raise _damaged(name + SHAPE, f"says {tuple(stored.tolist())}, expected {shape}")
        packed = _checked(tensors, name + PACKED, torch.int32, (rows, packed_words(columns, spec.bits)))
        scale = _checked(tensors, name + SCALE, torch.float16, (rows, groups))
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            raise _damaged(name + SCALE, "holds a scale that is negative or not finite")
        zero_point = None
        if not spec.symmetric:
            words = packed_words(rows, spec.bits), groups
            packed_zeros = _checked(tensors, name + ZERO_POINT, torch.int32, words)
            zero_point = unpack(packed_zeros.T.contiguous(), spec.bits, rows).T.contiguous()
        return cls(unpack(packed, spec.bits, columns), scale, zero_point, spec)


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """Codes without limits: value = code · scale · √2^(row exponent + column exponent)."""

    codes: Tensor  # (rows, columns) of int8, int16 or int32
    row_exponents: Tensor  # (rows,) of int8, from 0 to 15
    column_exponents: Tensor  # (columns,) of int8, from 0 to 15
    scale: float  # a float32

    def values(self) -> Tensor:
        """The numbers, (rows, columns) of float32."""
        rows, columns = self._sides()
        return self.codes.float().mul_(rows).mul_(columns)

    def steps(self) -> Tensor:
        """Distance of neighbouring values, (rows, columns) of float32."""
        rows, columns = self._sides()
        return rows * columns

    def of_multiples(self, multiples: Tensor) -> CodedTensor:
        """The matrix of other multiples of the steps, (rows, columns)."""
        exponents = self.row_exponents, self.column_exponents
        return CodedTensor(narrowed(multiples.to(torch.int32)), *exponents, self.scale)

    def _sides(self) -> tuple[Tensor, Tensor]:
        rows, columns = HALF_OCTAVES[self.row_exponents.long()], HALF_OCTAVES[self.column_exponents.long()]
        return rows[:, None] * self.scale, columns

    @cached_property
    def stream(self) -> Tensor:
        """The bytes of the file, 1-D of uint8."""
        return encode(self.codes, self.row_exponents, self.column_exponents, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes in the file; codes the matrix once."""
        return self.stream.numel()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        return {name + CODED: self.stream}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> CodedTensor:
        """Undo :meth:`tensors`.

        Args:
            tensors: at least that of this matrix.
            name: as given to :meth:`tensors`.
            shape: (rows, columns).

        Raises:
            MpocError: the tensor is missing, has another dtype, or is not the stream of such a matrix.
        """
        stream = _checked(tensors, name + CODED, torch.uint8, None)
        try:
            return cls(*decode(stream, *shape))
        except MpocError as error:
            raise _damaged(name + CODED, str(error)) from None


QuantizedTensor = GridTensor | CodedTensor


def quantized_from_tensors(
    tensors: Mapping[str, Tensor], name: str, spec: Storage, shape: tuple[int, int]
) -> QuantizedTensor:
    """The matrix of either storage; arguments and errors as of the two ``from_tensors``."""
    if isinstance(spec, Coded):
        return CodedTensor.from_tensors(tensors, name, shape)
    return GridTensor.from_tensors(tensors, name, spec, shape)


def narrowed(codes: Tensor) -> Tensor:
    """Integers in the smallest of int8, int16 and their own type that holds them."""
    for dtype in (torch.int8, torch.int16):
        narrow = codes.to(dtype)
        if torch.equal(narrow.to(codes.dtype), codes):
            return narrow
    return codes


def _checked(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...] | None
) -> Tensor:
    """The tensor of this name, 1-D where ``shape`` is None."""
    if name not in tensors:
        raise MpocError(f"tensor {shortened(name)} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype:
        raise _damaged(name, f"has dtype {tensor.dtype}, expected {dtype}")
    if tensor.ndim != 1 if shape is None else tensor.shape != shape:
        raise _damaged(name, f"has shape {tuple(tensor.shape)}, expected {shape or 'one dimension'}")
    return tensor


def _damaged(name: str, reason: str) -> MpocError:
    return MpocError(f"tensor {shortened(name)}: {reason}")
