"""Entropy coding of a matrix of integer codes, its steps included, into one self-contained stream of bytes.

Rows and columns get levels, the logarithms of their spreads; the sum of both says how far a code is likely to
reach.  Sums are put together into classes, and each class is an independent chunk with Huffman tables of its
own (:mod:`mpoc.quantize.packing`).  That is within 0.06 bits of the entropy of the classes.

Streams are untrusted: the shape is known before anything is decoded, no chunk is inflated beyond its number
of codes, and nothing but the exact length is accepted.

The stream, little-endian, counts as varints::

    scale (float32) · chunks: row exponents, column exponents, row levels, column levels
    number of further classes · the sum of levels at which each begins · the chunk of each class: its codes by
    level of row, by level of column, by row, by column
"""

from __future__ import annotations

import bisect
import itertools
import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.quantize.packing import (
    ALPHABETS,
    EXPANSION,
    MOST_CONSTANT,
    Counts,
    Integers,
    StreamReader,
    chunk_bits,
    damaged,
    plan,
    reach,
    read_chunk,
    smallest_type,
    table_bits,
    varint,
    write_chunk,
)

MOST_EXPONENT = 15
# Levels of rows and of columns, and how many make an octave of spread.
_LEVELS = 32
_IN_AN_OCTAVE = 3
_LARGEST = float(np.finfo(np.float32).max)


def encode(codes: Tensor, row_exponents: Tensor, column_exponents: Tensor, scale: float) -> Tensor:
    """Code a matrix; the same bytes for the same input.

    Args:
        codes: (rows, columns) of any signed integers that fit int32.
        row_exponents: (rows,) of integers from 0 to 15.
        column_exponents: (columns,) of the same.
        scale: stored as float32.

    Returns:
        The stream, 1-D of uint8.
    """
    matrix = codes.cpu().numpy()
    layout = _layout(matrix)
    sides = [row_exponents.cpu().numpy(), column_exponents.cpu().numpy(), *layout.levels]
    parts = [
        struct.pack("<f", scale),
        *map(write_chunk, sides),
        varint(len(layout.cuts)),
        *map(varint, layout.cuts),
    ]
    ordered = matrix[np.argsort(layout.levels[0], kind="stable")]
    ordered = ordered[:, np.argsort(layout.levels[1], kind="stable")]
    for blocks in _classes(layout.levels, layout.cuts):
        parts.append(write_chunk(np.concatenate([ordered[block].reshape(-1) for block in blocks])))
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def decode(stream: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Undo :func:`encode`.

    Args:
        stream: 1-D of uint8.
        rows: of the coded matrix.
        columns: of the coded matrix.

    Returns:
        Codes (rows, columns) in the smallest of int8, int16 and int32, row exponents (rows,) and column
        exponents (columns,) of int8, and the scale.

    Raises:
        MpocError: the stream is not that of a matrix of this shape.  Memory stays in proportion to the shape
            and to the stream.
    """
    reader = StreamReader(stream.numpy().tobytes())
    room = len(reader.data) * EXPANSION * max(ALPHABETS) + 2 * _LEVELS * MOST_CONSTANT
    if rows * columns > room:
        raise damaged(f"{len(reader.data)} bytes cannot hold {rows}×{columns} codes")
    (scale,) = struct.unpack("<f", reader.take(4))
    if not 0.0 < scale < float("inf"):
        raise damaged("bad scale")
    exponents = [_read_side(reader, size, MOST_EXPONENT) for size in (rows, columns)]
    levels = [_read_side(reader, size, _LEVELS - 1) for size in (rows, columns)]
    cuts = [reader.varint() for _ in range(reader.varint(2 * _LEVELS))]
    if sorted(set(cuts)) != cuts:
        raise damaged("classes out of order")
    matrix = _read_matrix(reader, levels, cuts)
    reader.end()
    octaves = sum(int(side.max(initial=0)) for side in exponents) / 2
    most = max(1, -int(matrix.min(initial=0)), int(matrix.max(initial=0)))
    if most * scale * 2.0**octaves > _LARGEST:
        raise damaged("its scale makes numbers that are not finite")
    return torch.from_numpy(matrix), torch.from_numpy(exponents[0]), torch.from_numpy(exponents[1]), scale


def entropy_bits(codes: Tensor, row_exponents: Tensor, column_exponents: Tensor) -> float:
    """Predict the bits of :func:`encode`'s stream without coding, within 2 per cent of all but tiny ones."""
    sides = sum(chunk_bits(values.cpu().numpy()) for values in (row_exponents, column_exponents))
    return _layout(codes.cpu().numpy()).bits + sides + 32.0


@dataclass(frozen=True)
class _Layout:
    """The classes of a matrix."""

    levels: list[Integers]  # of the rows, of the columns
    cuts: list[int]  # sums of levels at which all classes but the first begin
    bits: float  # predicted, of levels and codes


def _layout(matrix: Integers) -> _Layout:
    """The layout of fewest bits: levels of both sides, of one, or of none."""
    squares = matrix.astype(np.float32) ** 2
    by_column = squares.mean(0) if len(matrix) else np.zeros(matrix.shape[1], np.float32)
    by_row = squares @ np.where(by_column > 0, 1.0 / np.maximum(by_column, 1e-30), 0.0).astype(np.float32)
    levels = [_levels(by_row), _levels(by_column)]
    low, high = reach(matrix)
    counts = _joint_counts(matrix, levels, low, high)
    side_bits = [chunk_bits(side) for side in levels]
    flat = {axis for axis, size in enumerate(counts.shape[:2]) if size == 1}
    found = []
    for axes in (axes for axes in ((), (0,), (1,), (0, 1)) if not flat & {*axes}):
        sums = _sums_of_levels(counts.sum(axes, keepdims=True))
        cuts, bits = _cuts(sums)
        found.append((bits + sum(side_bits[axis] for axis in {0, 1}.difference(axes)), axes, cuts, sums))
    _, axes, cuts, sums = min(found)
    kept = [np.zeros_like(side) if axis in axes else side for axis, side in enumerate(levels)]
    classes = np.add.reduceat(sums, [0, *cuts], axis=0)
    bits = sum(plan(counts_of_class, low)[0].bits for counts_of_class in classes)
    return _Layout(kept, cuts, bits + sum(map(chunk_bits, kept)) + 8.0 * (1 + len(cuts)))


def _levels(squares: NDArray[np.float32]) -> NDArray[np.int8]:
    """Levels of lines by their mean squares, from 0; the outermost take all that is beyond."""
    octaves = 0.5 * np.log2(np.maximum(squares, 1e-30))
    middle = np.median(octaves) if len(octaves) else 0.0
    places = np.rint((octaves - middle) * _IN_AN_OCTAVE) + _LEVELS // 2
    levels = places.clip(0, _LEVELS - 1).astype(np.int8)
    found: NDArray[np.int8] = levels - levels.min(initial=_LEVELS - 1)
    return found


def _joint_counts(matrix: Integers, levels: list[NDArray[np.int8]], low: int, high: int) -> Counts:
    """Histograms (row levels, column levels, codes), the last code: outside."""
    width = high - low + 2
    places = matrix.astype(np.int64) - low
    places[(places < 0) | (places >= width - 1)] = width - 1
    rows, columns = (side.astype(np.int64) for side in levels)
    sizes = [int(side.max(initial=0)) + 1 for side in levels]
    places += (rows[:, None] * sizes[1] + columns) * width
    return np.bincount(places.reshape(-1), minlength=sizes[0] * sizes[1] * width).reshape(*sizes, width)


def _sums_of_levels(counts: Counts) -> Counts:
    """Histograms by the sum of both levels."""
    rows, columns, width = counts.shape
    found = np.zeros((rows + columns - 1, width), np.int64)
    for level in range(rows):
        found[level : level + columns] += counts[level]
    return found


def _cuts(counts: Counts) -> tuple[list[int], float]:
    """Where to cut histograms (sums of levels, codes) into classes of fewest bits, and these bits.

    Dynamic programming; bits are the entropy of each class and about the bytes of its tables.
    """
    sums = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(0)]).astype(np.float64)
    best, back = [0.0], [0]
    for end in range(1, len(sums)):
        joined = sums[end] - sums[:end]  # (end, codes): a class from any begin
        total = joined.sum(1)
        bits = total * np.log2(np.maximum(total, 1)) - (joined * np.log2(np.maximum(joined, 1))).sum(1)
        costs = np.array(best) + bits + table_bits((joined > 0).sum(1)) + 40.0
        back.append(int(costs.argmin()))
        best.append(float(costs.min()))
    cuts, begin = [], back[-1]
    while begin:
        cuts.append(begin)
        begin = back[begin]
    return cuts[::-1], best[-1]


def _classes(levels: list[Integers], cuts: list[int]) -> list[list[tuple[slice, slice]]]:
    """For each class its blocks of the matrix with rows and columns in order of their levels."""
    found: list[list[tuple[slice, slice]]] = [[] for _ in range(len(cuts) + 1)]
    ends = [np.bincount(side, minlength=1).cumsum().tolist() for side in levels]
    for i, (top, bottom) in enumerate(itertools.pairwise([0, *ends[0]])):
        for j, (left, right) in enumerate(itertools.pairwise([0, *ends[1]])):
            found[bisect.bisect_right(cuts, i + j)].append((slice(top, bottom), slice(left, right)))
    return found


def _read_side(reader: StreamReader, count: int, most: int) -> NDArray[np.int8]:
    """Exponents or levels, from 0 to ``most``."""
    values = read_chunk(reader, count)
    if values.size and (values.min() < 0 or values.max() > most):
        raise damaged("an exponent or level is out of range")
    return values.astype(np.int8)


def _read_matrix(reader: StreamReader, levels: list[NDArray[np.int8]], cuts: list[int]) -> Integers:
    """The codes (rows, columns) of all classes, in the smallest type that holds them."""
    shape = len(levels[0]), len(levels[1])
    classes = _classes(levels, cuts)
    chunks = []
    for blocks in classes:
        chunks.append(read_chunk(reader, sum(_size(block) for block in blocks)))
    ordered = np.empty(shape, np.result_type(*chunks))
    for blocks, chunk in zip(classes, chunks, strict=True):
        at = 0
        for block in blocks:
            size = _size(block)
            ordered[block] = chunk[at : at + size].reshape(ordered[block].shape)
            at += size
    smallest = smallest_type(int(ordered.min(initial=0)), int(ordered.max(initial=0)))
    rows, columns = (np.argsort(np.argsort(side, kind="stable")) for side in levels)
    return np.take(ordered.astype(smallest, copy=False)[rows], columns, axis=1)


def _size(block: tuple[slice, slice]) -> int:
    return (block[0].stop - block[0].start) * (block[1].stop - block[1].start)
