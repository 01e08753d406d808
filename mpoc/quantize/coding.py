"""Entropy coding of a matrix of integer codes, its steps included, into one self-contained stream of bytes.

Lines of the matrix (its columns, or its rows where that is smaller) are grouped into classes of similar
spread; each class is an independent chunk with Huffman tables of its own.  In a chunk, k codes of a small
alphabet make one byte, and raw deflate (Huffman only, RFC 1951) codes the bytes: k > 1 gives less than one
bit a code, and rounds fewer bits up.  Codes outside the alphabet are listed apart.  That is within 0.06 bits
of the order-0 entropy, and zlib decodes hundreds of millions of bytes a second and checks what it reads; an
arithmetic coder would be tighter by one per cent and has no decoder in Python's standard library.

Streams are untrusted: the shape is known before anything is decoded, no chunk is inflated beyond its number
of codes, and nothing but the exact length is accepted.

The stream, little-endian, counts as varints (LEB128)::

    axis (1 byte: 0 classes of columns, 1 of rows) · scale (float32) · number of classes
    chunks: row exponents · column exponents · class of each line, if above 1 · codes of each class by line
    chunk: k (1 byte) · lowest code, zigzag · number of outliers · bytes of the payload
           · payload, ⌈n / k⌉ bytes deflated
           · if outliers: widths (1 byte) · bytes deflated · gaps, zigzag values, as planes of bytes
"""

from __future__ import annotations

import heapq
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.errors import MpocError

# Codes of one byte: how many distinct ones, by how many of them make the byte.
ALPHABETS = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}
MOST_EXPONENT = 15
# Lines are sorted by spread into so many buckets, from which the classes are put together.
_BUCKETS = 32
# Histograms reach so far to either side of the median; beyond are outliers whatever the alphabet.
_REACH = 256
# Deflate turns one byte into at most so many.
_EXPANSION = 1032
# zlib's literals in one block at the largest memory level.
_BLOCK = 32767

_Integers = NDArray[np.signedinteger[Any]]
_Counts = NDArray[np.int64]


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
    matrix = codes.numpy()
    layout = min((_layout(matrix, axis) for axis in (0, 1)), key=lambda layout: layout.bits)
    parts = [struct.pack("<Bf", layout.axis, scale), _varint(len(layout.classes))]
    parts += [_chunk(row_exponents.numpy()), _chunk(column_exponents.numpy())]
    if len(layout.classes) > 1:
        labels = np.zeros(len(layout.lines), np.int8)
        for label, members in enumerate(layout.classes):
            labels[members] = label
        parts.append(_chunk(labels))
    parts += [_chunk(layout.lines[members].reshape(-1)) for members in layout.classes]
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
    reader = _Reader(stream.numpy().tobytes())
    if rows * columns > len(reader.data) * _EXPANSION * max(ALPHABETS):
        raise _damaged(f"{len(reader.data)} bytes cannot hold {rows}×{columns} codes")
    axis, scale = struct.unpack("<Bf", reader.take(5))
    if axis > 1 or not 0.0 < scale < float("inf"):
        raise _damaged("bad header")
    count = reader.varint()
    exponents = [_read_chunk(reader, size) for size in (rows, columns)]
    if any(values.size and (values.min() < 0 or values.max() > MOST_EXPONENT) for values in exponents):
        raise _damaged("an exponent is out of range")
    lines = _read_classes(reader, count, (columns, rows) if axis == 0 else (rows, columns))
    reader.end()
    codes = torch.from_numpy(lines.T if axis == 0 else lines).contiguous()
    row_exponents, column_exponents = (torch.from_numpy(values.astype(np.int8)) for values in exponents)
    return codes, row_exponents, column_exponents, scale


def entropy_bits(codes: Tensor, row_exponents: Tensor, column_exponents: Tensor) -> float:
    """Predict the bits of :func:`encode`'s stream without coding, within 2 per cent of all but tiny ones."""
    matrix = codes.numpy()
    exponents = sum(
        _plan(*_histogram(values.numpy()))[0].bits for values in (row_exponents, column_exponents)
    )
    return min(_layout(matrix, axis).bits for axis in (0, 1)) + exponents + 48.0


@dataclass(frozen=True)
class _Packing:
    """How a chunk's codes become bytes."""

    bits: float  # predicted, of the whole chunk
    k: int  # codes in a byte
    low: int  # the lowest code of the alphabet


@dataclass(frozen=True)
class _Layout:
    """The lines of a matrix in classes."""

    axis: int
    lines: _Integers  # (lines, length)
    classes: list[NDArray[np.intp]]  # the lines of each class, rising
    bits: float  # predicted, of all chunks


def _layout(matrix: _Integers, axis: int) -> _Layout:
    lines = np.ascontiguousarray(matrix.T if axis == 0 else matrix)
    numbers = lines.astype(np.float32)
    order = np.argsort(np.einsum("ij,ij->i", numbers, numbers), kind="stable")
    buckets = np.array_split(order, min(_BUCKETS, max(1, len(order))))
    low, high = _reach(lines)
    counts = np.stack([_counts(lines[bucket], low, high) for bucket in buckets])
    cuts = _cuts(counts, [len(bucket) for bucket in buckets])
    classes = [np.sort(np.concatenate(buckets[a:b])) for a, b in cuts]
    bits = sum(_plan(counts[a:b].sum(0), low)[0].bits for a, b in cuts)
    if len(classes) > 1:
        shares = np.array([len(members) for members in classes]) / len(lines)
        bits += len(lines) * float(-(shares * np.log2(shares)).sum()) + 80.0
    return _Layout(axis, lines, classes, bits)


def _reach(values: _Integers) -> tuple[int, int]:
    """The lowest and the highest code that histograms count."""
    if not values.size:
        return 0, 0
    low, high = int(values.min()), int(values.max())
    if high - low > 2 * _REACH:
        middle = int(np.median(values))
        low, high = max(low, middle - _REACH), min(high, middle + _REACH)
    return low, high


def _counts(values: _Integers, low: int, high: int) -> _Counts:
    """How often each code from ``low`` to ``high`` occurs; in the last place, how many lie outside."""
    places = values.reshape(-1).astype(np.int64) - low
    places[(places < 0) | (places > high - low)] = high - low + 1
    return np.bincount(places, minlength=high - low + 2)


def _histogram(values: _Integers) -> tuple[_Counts, int]:
    low, high = _reach(values)
    return _counts(values, low, high), low


def _cuts(counts: _Counts, sizes: list[int]) -> list[tuple[int, int]]:
    """Intervals of buckets whose entropies, tables and labels take the fewest bits: dynamic programming."""
    count = len(counts)
    sums = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(0)])
    lines = np.cumsum([0, *sizes])
    best, back = [0.0], [0]
    for b in range(1, count + 1):
        joined = (sums[b] - sums[:b]).astype(np.float64)  # (b, codes): buckets a … b − 1, for every a
        total = joined.sum(1)
        bits = total * np.log2(np.maximum(total, 1)) - (joined * np.log2(np.maximum(joined, 1))).sum(1)
        labels = (lines[b] - lines[:b]) * np.log2(lines[-1] / np.maximum(lines[b] - lines[:b], 1))
        costs = np.array(best) + bits + labels + _table_bits((joined > 0).sum(1)) + 40.0
        back.append(int(costs.argmin()))
        best.append(float(costs.min()))
    cuts: list[tuple[int, int]] = []
    while count:
        cuts.append((back[count], count))
        count = back[count]
    return cuts[::-1]


def _table_bits(symbols: Any) -> Any:
    """Predicted bits of one dynamic block's header with so many distinct bytes, measured on zlib."""
    return 90.0 + 3.2 * symbols


def _plan(counts: _Counts, low: int) -> list[_Packing]:
    """Packings of a chunk with this histogram (the last place: outside), the smallest first."""
    total = int(counts.sum())
    inside = counts[:-1]
    found = []
    for k, size in ALPHABETS.items():
        sums = np.concatenate([[0], inside.cumsum()])
        covered = sums[size:] - sums[:-size] if size < len(sums) else sums[-1:]
        start = int(covered.argmax())
        outliers = total - int(covered[start])
        if k == 1 or outliers * 5 <= total:
            window = inside[start : start + size].astype(np.float64)
            window[window.argmax()] += outliers
            found.append(_Packing(_packed_bits(window, total, k, outliers), k, low + start))
    return sorted(found, key=lambda packing: packing.bits)


def _packed_bits(window: NDArray[np.float64], total: int, k: int, outliers: int) -> float:
    """Predict the bits of a chunk whose codes are independent, ``window`` of each."""
    share = window[window > 0] / max(total, 1)
    joint = share
    for _ in range(k - 1):
        joint = np.outer(joint, share).reshape(-1)
    size = -(-total // k)
    blocks = -(-size // _BLOCK)
    used = (1.0 - (1.0 - joint) ** min(size, _BLOCK)).sum()
    listed = outliers * (np.log2(total / outliers) + 5.0) + 60.0 if outliers else 0.0
    # Where deflate is close to its limit of one bit a byte, matches take about this share of the entropy.
    matched = 1.4 * k * float(-(share * np.log2(share)).sum())
    return float(size * min(matched, _huffman_bits(joint)) + blocks * _table_bits(used) + listed + 40.0)


def _huffman_bits(shares: NDArray[np.float64]) -> float:
    """Mean length of a Huffman code, in bits."""
    heap: list[float] = shares.tolist()
    heapq.heapify(heap)
    mean = 0.0 if len(heap) > 1 else 1.0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, pair)
        mean += pair
    return mean


def _chunk(values: _Integers) -> bytes:
    """Code integers as one chunk."""
    plans = _plan(*_histogram(values))
    near = [plan for plan in plans if plan.bits <= 1.03 * plans[0].bits + 64.0]
    return min((_packed(values, plan) for plan in near), key=len)


def _packed(values: _Integers, packing: _Packing) -> bytes:
    size, k = ALPHABETS[packing.k], packing.k
    digits = values.astype(np.int64) - packing.low
    (outside,) = np.nonzero((digits < 0) | (digits >= size))
    digits[outside] = 0
    digits[outside] = np.bincount(digits, minlength=1).argmax()
    padded = np.concatenate([digits, np.zeros(-len(digits) % k, np.int64)]).reshape(-1, k)
    payload = _deflate((padded @ size ** np.arange(k)).astype(np.uint8).tobytes())
    head = bytes([k]) + _varint(_zigzag(packing.low)) + _varint(len(outside)) + _varint(len(payload))
    return head + payload + (_outliers(outside, values[outside]) if len(outside) else b"")


def _outliers(places: NDArray[np.intp], values: _Integers) -> bytes:
    gaps = np.diff(places, prepend=-1) - 1
    wide = values.astype(np.int64)
    columns = [gaps, np.where(wide < 0, -2 * wide - 1, 2 * wide)]
    widths = [max(1, (int(column.max()).bit_length() + 7) // 8) for column in columns]
    planes = [
        (column >> (8 * plane)) & 255
        for column, width in zip(columns, widths, strict=True)
        for plane in range(width)
    ]
    deflated = _deflate(np.concatenate(planes).astype(np.uint8).tobytes())
    return bytes([widths[0] | widths[1] << 4]) + _varint(len(deflated)) + deflated


def _deflate(data: bytes) -> bytes:
    """Raw deflate: Huffman only; matches too where a code of one bit a byte is the limit."""
    found = _compressed(data, zlib.Z_HUFFMAN_ONLY)
    if 4 * len(found) < len(data) or len(data) < 4096:
        matched = (_compressed(data, strategy) for strategy in (zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY))
        return min(found, *matched, key=len)
    return found


def _compressed(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _zigzag(value: int) -> int:
    return -2 * value - 1 if value < 0 else 2 * value


@dataclass
class _Reader:
    """Bytes of a stream, taken in order."""

    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _damaged("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise _damaged("a count is too large")

    def inflate(self, length: int, size: int) -> NDArray[np.uint8]:
        """The next ``length`` bytes, inflated to exactly ``size``."""
        decoder = zlib.decompressobj(-15)
        try:
            data = decoder.decompress(self.take(length), size + 1)
        except zlib.error as error:
            raise _damaged(f"zlib says {error}") from error
        if len(data) != size or not decoder.eof or decoder.unused_data:
            raise _damaged("a chunk has the wrong length")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if self.at != len(self.data):
            raise _damaged(f"{len(self.data) - self.at} bytes are left over")


def _damaged(reason: str) -> MpocError:
    return MpocError(f"the coded stream is damaged: {reason}")


def _read_classes(reader: _Reader, count: int, shape: tuple[int, int]) -> _Integers:
    """The codes (lines, length) of all classes."""
    if not 1 <= count <= _BUCKETS:
        raise _damaged(f"{count} classes")
    labels = _read_chunk(reader, shape[0]) if count > 1 else np.zeros(shape[0], np.int8)
    if labels.size and (labels.min() < 0 or labels.max() >= count):
        raise _damaged("a class is out of range")
    members = [np.nonzero(labels == k)[0] for k in range(count)]
    chunks = [_read_chunk(reader, len(lines) * shape[1]) for lines in members]
    codes = np.empty(shape, np.result_type(*chunks))
    for lines, chunk in zip(members, chunks, strict=True):
        codes[lines] = chunk.reshape(len(lines), shape[1])
    smallest = _smallest(int(codes.min(initial=0)), int(codes.max(initial=0)))
    return codes.astype(smallest, copy=False)


def _read_chunk(reader: _Reader, count: int) -> _Integers:
    """``count`` codes, in the smallest type that holds them."""
    (k,) = reader.take(1)
    if k not in ALPHABETS:
        raise _damaged(f"{k} codes in a byte")
    low, outliers, length = (reader.varint() for _ in range(3))
    low = low // 2 if low % 2 == 0 else -(low + 1) // 2
    if outliers > count:
        raise _damaged(f"{outliers} outliers among {count} codes")
    packed = reader.inflate(length, -(-count // k))
    size = ALPHABETS[k]
    if packed.size and int(packed.max()) >= size**k:
        raise _damaged("a byte is out of range")
    digits = np.arange(256)[:, None] // size ** np.arange(k) % size  # (256, k)
    high = low + (int(packed.max(initial=0)) if k == 1 else size - 1)
    table = (digits + low).astype(_smallest(low, high))
    codes: _Integers = np.take(table, packed, axis=0).reshape(-1)[:count]
    return _with_outliers(reader, codes, outliers) if outliers else codes


def _with_outliers(reader: _Reader, codes: _Integers, count: int) -> _Integers:
    (widths,) = reader.take(1)
    sizes = widths & 15, widths >> 4
    if not (1 <= sizes[0] <= 5 and 1 <= sizes[1] <= 5):
        raise _damaged("bad outliers")
    planes = reader.inflate(reader.varint(), count * sum(sizes)).reshape(-1, count).astype(np.int64)
    gaps, wide = (
        sum((plane << (8 * p) for p, plane in enumerate(part)), start=np.zeros(count, np.int64))
        for part in (planes[: sizes[0]], planes[sizes[0] :])
    )
    places = np.cumsum(gaps + 1) - 1
    values = np.where(wide % 2 == 0, wide // 2, -(wide + 1) // 2)
    if int(gaps.max()) >= len(codes) or places[-1] >= len(codes) or np.abs(values).max() >= 1 << 31:
        raise _damaged("an outlier is out of range")
    low, high = int(values.min()), int(values.max())
    merged = codes.astype(np.result_type(codes.dtype, _smallest(low, high)))
    merged[places] = values
    return merged


def _smallest(low: int, high: int) -> type[np.signedinteger[Any]]:
    """The smallest signed type that holds both."""
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise _damaged("a code is out of range")
