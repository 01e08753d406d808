"""Tensors that a compressed file stores in few bits: their matrices, their rounding, reading and writing.

A part (:class:`mpoc.io.manifest.CodedPart`) is a core, or the weight of a layer that stays dense. Its codes
form a matrix, which :mod:`mpoc.quantize` rounds and packs. Beside codes, vectors (norms, biases) are stored
as float16 where that is harmless. Everything above this package reads floats in the dtypes of the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import HALF, CodedPart, LayerRecord, storage_record
from mpoc.io.safetensors_writer import Entry
from mpoc.quantize.codes import GridTensor, QuantizedTensor, quantized_from_tensors
from mpoc.quantize.feedback import best_exponents
from mpoc.quantize.grid_rounding import round_grid
from mpoc.quantize.rounding import coded_in_bytes
from mpoc.quantize.storage import Coded, Grid, Storage, default_grid
from mpoc.tensor_networks.forms.layout import from_matrix, to_matrix

# Bytes that a coded stream may take beyond its bits a number: header and tables of a tiny tensor.
_STREAM_OVERHEAD = 64
# Vectors that are multiplied with or added; what else networks keep (frequencies, positions) stays exact.
_NORM_OR_BIAS = re.compile(r"(weight|bias|gamma|beta|running_mean|running_var)[^.]*$")
# What float16 may change: this share of a number, or this share of the largest.
_HARMLESS, _HARMLESS_OF_LARGEST = 2.0**-10, 2.0**-14


@dataclass(frozen=True)
class Rounding:
    """How what is stored of a layer is rounded."""

    storage: str  # "grid" or "coded"
    bits: float  # of a code on a grid; of a number, everything counted, in a coded stream

    def planned(self, record: LayerRecord) -> LayerRecord:
        """The record with the storage of its tensors, and an upper bound on their bytes."""
        coded = storage_record(Coded())
        parts = replace(record, storage=(coded,) * max(record.num_cores, 1)).coded_parts
        if self.storage == "coded":
            nbytes = sum(self.most_bytes(math.prod(part.shape)) for part in parts)
            return replace(record, storage=(coded,) * len(parts), nbytes=nbytes)
        grids = [default_grid(int(self.bits), part.sides[1]) for part in parts]
        sizes = [grid.stored_bytes(*part.sides) for grid, part in zip(grids, parts, strict=True)]
        return replace(record, storage=tuple(map(storage_record, grids)), nbytes=sum(sizes))

    def most_bytes(self, count: int) -> int:
        """The most bytes of a coded stream of ``count`` numbers."""
        return math.ceil(count * self.bits / 8) + _STREAM_OVERHEAD

    def of_bytes(self, nbytes: int, count: int, streams: int) -> Rounding:
        """The coded rounding with which ``count`` numbers in so many streams take at most ``nbytes``."""
        return replace(self, bits=8 * (nbytes - streams * (_STREAM_OVERHEAD + 1)) / count)

    def codes(self, record: LayerRecord, tensors: Sequence[Tensor]) -> list[QuantizedTensor]:
        """Round each core of a layer, or its weight where the form is ``dense``, to the nearest codes.

        Raises:
            MpocError: a number is too large for the storage.
        """
        parts = self.planned(record).coded_parts
        return [self.nearest(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def nearest(self, part: CodedPart, tensor: Tensor) -> QuantizedTensor:
        """Round one tensor of a layer to the nearest codes."""
        matrix = matrix_of(part, tensor).detach().cpu().float()
        if isinstance(part.storage, Grid):
            return round_grid(matrix, None, part.storage)
        rows, columns = (best_exponents(None, side) for side in part.sides)
        return coded_in_bytes(matrix, None, rows, columns, self.most_bytes(matrix.numel()))


def rounding_of(record: LayerRecord) -> Rounding:
    """The rounding that gives a recorded layer about its bytes again."""
    parts = record.coded_parts
    if isinstance(parts[0].storage, Grid):
        return Rounding("grid", parts[0].storage.bits)
    nbytes = record.stored_bytes - _STREAM_OVERHEAD * len(parts)
    return Rounding("coded", 8 * max(nbytes, 0) / record.num_stored)


def matrix_of(part: CodedPart, tensor: Tensor) -> Tensor:
    """The matrix (rows, columns) of a part's values."""
    return tensor.reshape(part.sides) if part.structure is None else to_matrix(tensor, part.structure)[0]


def tensor_of(part: CodedPart, matrix: Tensor) -> Tensor:
    """Undo :func:`matrix_of`; contiguous."""
    if part.structure is None:
        return matrix.reshape(part.shape).contiguous()
    return from_matrix(matrix[None], part.structure)


def codes_from_file(part: CodedPart, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The codes of a part from its tensors in the file, by their names there.

    Raises:
        MpocError: they are damaged.
    """
    return quantized_from_tensors(tensors, part.name, part.storage, part.sides)


def storage_of(codes: QuantizedTensor) -> Storage:
    """The storage that codes are of."""
    return codes.spec if isinstance(codes, GridTensor) else Coded()


def with_codes(record: LayerRecord, codes: Sequence[QuantizedTensor]) -> LayerRecord:
    """The record of a layer that is stored as these codes, with their bytes."""
    storage = tuple(storage_record(storage_of(own)) for own in codes)
    return replace(record, storage=storage, nbytes=sum(own.nbytes for own in codes))


def values_of_all(record: LayerRecord, codes: Sequence[QuantizedTensor]) -> list[Tensor]:
    """The cores, or the dense weight, that codes stand for, in the dtype that readers get."""
    dtype = getattr(torch, record.stored_dtype)
    pairs = zip(record.coded_parts, codes, strict=True)
    return [tensor_of(part, own.values()).to(dtype) for part, own in pairs]


def coded_entries(record: LayerRecord, codes: Sequence[QuantizedTensor]) -> list[Entry]:
    """The tensors of the file that hold these codes."""
    pairs = zip(record.coded_parts, codes, strict=True)
    return [Entry.of(*item) for part, own in pairs for item in own.tensors(part.name).items()]


def fits_half(name: str, tensor: Tensor) -> bool:
    """Whether float16 can stand for a float32 norm, bias or running statistic without harm.

    No number changes by more than 2^-10 of itself or 2^-14 of the largest: numbers in float16's normal range
    change by 2^-11 at most. A variance, whose square root divides, must keep the first, however small it is.
    """
    if tensor.dtype != torch.float32 or tensor.ndim > 1 or not _NORM_OR_BIAS.search(name):
        return False
    size = tensor.abs()
    allowed = size * _HARMLESS
    if not name.endswith("running_var"):
        allowed = allowed.clamp(min=float(size.max()) * _HARMLESS_OF_LARGEST if size.numel() else 0.0)
    return bool(((tensor.half().float() - tensor).abs() <= allowed).all())


def halved_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The vectors of a checkpoint that are written as float16 beside codes.

    None where the checkpoint has float16 vectors of its own, from which a reader could not tell them.
    """
    vectors = [info for info in checkpoint.infos.values() if len(info.shape) <= 1]
    if any(info.dtype == HALF for info in vectors):
        return frozenset()
    wide = [info.name for info in vectors if info.dtype == "float32"]
    return frozenset(name for name in wide if fits_half(name, checkpoint.read(name)))


def halved_entry(entry: Entry) -> Entry:
    """A vector as float16; as it is where it overflows, or has that dtype."""
    half = entry.read().half()
    return Entry.of(entry.info.name, half) if bool(half.isfinite().all()) else entry
