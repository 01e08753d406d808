"""Pack integers into words of fixed widths (grids) and into deflated bytes (chunks of coded matrices).

In words, low bits first: code k of a row occupies the bits k·b … k·b + b − 1 of the row's bit stream; a code
may cross from one word into the next, and each row is padded with zeros to whole words.  For 2, 4 and 8 bits
no code crosses, and the layout is that of every release of compressed-tensors; for 3, 5 and 6 bits it is that
of its dense layout (``pack_to_int32`` of compressed-tensors 0.15 and later).

In a chunk, k codes of a small alphabet make one byte, and raw deflate (Huffman only, RFC 1951) codes the
bytes: k > 1 gives less than one bit a code, and rounds fewer bits up.  Codes outside the alphabet are listed
apart.  zlib decodes hundreds of millions of bytes a second and checks what it reads; an arithmetic coder
would be tighter by one per cent, and Python has none.  A chunk, counts as varints (LEB128)::

    k (1 byte) · lowest code, zigzag · unless k is 0 (at most 65536 codes, all the lowest):
    number of outliers · bytes of the payload · payload, ⌈n / k⌉ bytes deflated
    if outliers: widths (1 byte) · bytes deflated · gaps and zigzag values, as planes of bytes
"""

from __future__ import annotations

import heapq
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.storage import packed_words

# Codes of one byte: how many distinct ones, by how many of them make the byte.
ALPHABETS = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}
# Deflate turns one byte into at most so many.
EXPANSION = 1032
# Codes of a chunk that is a constant; more are deflated, so that no short stream asks for much memory.
MOST_CONSTANT = 1 << 16
# Histograms reach so far to either side of the median; beyond are outliers whatever the alphabet.
_REACH = 256
# zlib's literals in one block at the largest memory level.
_BLOCK = 32767
# 32 codes of b bits fill b words exactly, whatever b.
_PERIOD = 32
_MASK = 0xFFFFFFFF

Integers = NDArray[np.signedinteger[Any]]
Counts = NDArray[np.int64]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes.

    Args:
        codes: (rows, columns) of uint8, each below 2^bits.
        bits: width of a code, 1 to 8.

    Returns:
        (rows, ⌈columns · bits / 32⌉) of int32.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % _PERIOD)).view(rows, -1, _PERIOD)
    words = padded.new_zeros((rows, padded.shape[1], bits + 1), dtype=torch.int64)
    for k in range(_PERIOD):
        word, shift = divmod(k * bits, 32)
        shifted = padded[:, :, k].long() << shift
        words[:, :, word] |= shifted & _MASK
        words[:, :, word + 1] |= shifted >> 32
    signed = words[:, :, :bits].to(torch.int32)  # wraps to two's complement
    return signed.reshape(rows, -1)[:, : packed_words(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        words: (rows, ⌈columns · bits / 32⌉) of int32.
        bits: width of a code, 1 to 8.
        columns: number of codes in a row.

    Returns:
        (rows, columns) of uint8.
    """
    rows = len(words)
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = words.new_empty((rows, padded.shape[1], _PERIOD), dtype=torch.uint8)
    for k in range(_PERIOD):
        word, shift = divmod(k * bits, 32)
        low = (padded[:, :, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            low = low | padded[:, :, word + 1] << (32 - shift)
        codes[:, :, k] = low & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :columns].contiguous()


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes for use in memory, where :func:`from_planes` is several times as fast.

    The bits of a code are cut into parts of 8, 4, 2 and 1 (5 = 4 + 1). Of a part of w bits, byte j holds
    those of codes j, j + n, j + 2n, …, low bits first, n = ⌈columns · w / 8⌉.

    Args:
        codes: (rows, columns) of uint8, each below 2^bits.
        bits: width of a code, 1 to 8.

    Returns:
        (rows, Σ n) of uint8.
    """
    rows, columns = codes.shape
    parts = []
    for width, shift in _parts(bits):
        part = codes >> shift & ((1 << width) - 1)
        planes = torch.nn.functional.pad(part, (0, -columns % (8 // width))).view(rows, 8 // width, -1)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        parts.append((planes << places[:, None]).sum(1, dtype=torch.uint8))
    return torch.cat(parts, dim=1)


def from_planes(planes: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`to_planes`: (rows, columns) of uint8; with 8 bits a view."""
    codes, at = None, 0
    for width, shift in _parts(bits):
        size = -(-columns * width // 8)
        held = planes[:, at : at + size]
        if width < 8:
            held = torch.cat([held >> place for place in range(0, 8, width)], dim=1) & ((1 << width) - 1)
        part = held[:, :columns]
        codes = part if codes is None else codes.bitwise_or_(part << shift)
        at += size
    assert codes is not None
    return codes


def chunk_bits(values: Integers) -> float:
    """Predicted bits of a chunk of exponents or levels."""
    return 16.0 if _constant(values) else plan(*_histogram(values))[0].bits


def write_chunk(values: Integers) -> bytes:
    """Code integers as one chunk."""
    if _constant(values):
        return b"\0" + varint(_zigzag(int(values[0]) if len(values) else 0))
    plans = plan(*_histogram(values))
    near = [each for each in plans if each.bits <= 1.03 * plans[0].bits + 64.0]
    return min((_packed(values, each) for each in near), key=len)


def read_chunk(reader: StreamReader, count: int) -> Integers:
    """``count`` codes, in the smallest type that holds them."""
    (k,) = reader.take(1)
    low = reader.varint()
    low = low // 2 if low % 2 == 0 else -(low + 1) // 2
    if k == 0 and count <= MOST_CONSTANT:
        return np.full(count, low, smallest_type(low, low))
    if k not in ALPHABETS:
        raise damaged(f"{k} codes in a byte")
    outliers, length = reader.varint(count), reader.varint()
    packed = reader.inflate(length, -(-count // k))
    size = ALPHABETS[k]
    if packed.size and int(packed.max()) >= size**k:
        raise damaged("a byte is out of range")
    digits = np.arange(256)[:, None] // size ** np.arange(k) % size  # (256, k)
    high = low + (int(packed.max(initial=0)) if k == 1 else size - 1)
    table = (digits + low).astype(smallest_type(low, high))
    codes: Integers = np.take(table, packed, axis=0).reshape(-1)[:count]
    return _with_outliers(reader, codes, outliers) if outliers else codes


def reach(values: Integers) -> tuple[int, int]:
    """The lowest and the highest code that histograms count."""
    if not values.size:
        return 0, 0
    low, high = int(values.min()), int(values.max())
    if high - low > 2 * _REACH:
        middle = int(np.median(values))
        low, high = max(low, middle - _REACH), min(high, middle + _REACH)
    return low, high


def plan(counts: Counts, low: int) -> list[ChunkPlan]:
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
            found.append(ChunkPlan(_packed_bits(window, total, k, outliers), k, low + start))
    return sorted(found, key=lambda packing: packing.bits)


def table_bits(symbols: Any) -> Any:
    """Predicted bits of one dynamic block's header with so many distinct bytes, measured on zlib."""
    return 90.0 + 3.2 * symbols


def varint(value: int) -> bytes:
    """A count in groups of seven bits, low bits first (LEB128)."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@dataclass
class StreamReader:
    """Bytes of a stream, taken in order."""

    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self.data) - self.at:
            raise damaged("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self, most: int = 1 << 35) -> int:
        """The next varint, which must not exceed ``most``."""
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128 and value <= most:
                return value
        raise damaged("a count is too large")

    def inflate(self, length: int, size: int) -> NDArray[np.uint8]:
        """The next ``length`` bytes, inflated to exactly ``size``."""
        decoder = zlib.decompressobj(-15)
        try:
            data = decoder.decompress(self.take(length), size + 1)
        except zlib.error as error:
            raise damaged(f"zlib says {error}") from error
        if len(data) != size or not decoder.eof or decoder.unused_data:
            raise damaged("a chunk has the wrong length")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        """Check that nothing is left."""
        if self.at != len(self.data):
            raise damaged(f"{len(self.data) - self.at} bytes are left over")


def damaged(reason: str) -> MpocError:
    """The error of a stream that is not what its shape asks for."""
    return MpocError(f"the coded stream is damaged: {reason}")


def smallest_type(low: int, high: int) -> type[np.signedinteger[Any]]:
    """The smallest signed type that holds both."""
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise damaged("a code is out of range")


@dataclass(frozen=True)
class ChunkPlan:
    """How a chunk's codes become bytes."""

    bits: float  # predicted, of the whole chunk
    k: int  # codes in a byte
    low: int  # the lowest code of the alphabet


def _parts(bits: int) -> list[tuple[int, int]]:
    """Widths of the parts of a code, and the bits below each."""
    return [(width, bits & ~(2 * width - 1)) for width in (8, 4, 2, 1) if bits & width]


def _constant(values: Integers) -> bool:
    return len(values) <= MOST_CONSTANT and bool((values[1:] == values[:-1]).all())


def _histogram(values: Integers) -> tuple[Counts, int]:
    low, high = reach(values)
    return _counts(values, low, high), low


def _counts(values: Integers, low: int, high: int) -> Counts:
    """How often each code from ``low`` to ``high`` occurs; in the last place, how many lie outside."""
    places = values.reshape(-1).astype(np.int64) - low
    places[(places < 0) | (places > high - low)] = high - low + 1
    return np.bincount(places, minlength=high - low + 2)


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
    return float(size * min(matched, _huffman_bits(joint)) + blocks * table_bits(used) + listed + 40.0)


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


def _packed(values: Integers, packing: ChunkPlan) -> bytes:
    size, k = ALPHABETS[packing.k], packing.k
    digits = values.astype(np.int64) - packing.low
    (outside,) = np.nonzero((digits < 0) | (digits >= size))
    digits[outside] = 0
    digits[outside] = np.bincount(digits, minlength=1).argmax()
    padded = np.concatenate([digits, np.zeros(-len(digits) % k, np.int64)]).reshape(-1, k)
    payload = _deflate((padded @ size ** np.arange(k)).astype(np.uint8).tobytes())
    head = bytes([k]) + varint(_zigzag(packing.low)) + varint(len(outside)) + varint(len(payload))
    return head + payload + (_outliers(outside, values[outside]) if len(outside) else b"")


def _outliers(places: NDArray[np.intp], values: Integers) -> bytes:
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
    return bytes([widths[0] | widths[1] << 4]) + varint(len(deflated)) + deflated


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


def _zigzag(value: int) -> int:
    return -2 * value - 1 if value < 0 else 2 * value


def _with_outliers(reader: StreamReader, codes: Integers, count: int) -> Integers:
    (widths,) = reader.take(1)
    sizes = widths & 15, widths >> 4
    if not (1 <= sizes[0] <= 5 and 1 <= sizes[1] <= 5):
        raise damaged("bad outliers")
    planes = reader.inflate(reader.varint(), count * sum(sizes)).reshape(-1, count).astype(np.int64)
    gaps, wide = (
        sum((plane << (8 * p) for p, plane in enumerate(part)), start=np.zeros(count, np.int64))
        for part in (planes[: sizes[0]], planes[sizes[0] :])
    )
    places = np.cumsum(gaps + 1) - 1
    values = np.where(wide % 2 == 0, wide // 2, -(wide + 1) // 2)
    if int(gaps.max()) >= len(codes) or places[-1] >= len(codes) or np.abs(values).max() >= 1 << 31:
        raise damaged("an outlier is out of range")
    low, high = int(values.min()), int(values.max())
    merged = codes.astype(np.result_type(codes.dtype, smallest_type(low, high)))
    merged[places] = values
    return merged
