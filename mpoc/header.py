"""The safetensors header: eight bytes of length, JSON, then raw tensor bytes.  No torch here.

``mpoc report`` lives on this alone, so that it is quick on a file of any size; reading and writing of
checkpoints share it.  The layout: https://huggingface.co/docs/safetensors (format section).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError

# safetensors' name of a dtype: (torch's name, bytes each), in the order in which its own writer stores them
DTYPES = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
CODES = {name: code for code, (name, _) in DTYPES.items()}
ITEMSIZE = dict(DTYPES.values())
# What the safetensors library accepts; also keeps a hostile length from being allocated.
_LONGEST_HEADER = 100_000_000
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape and dtype without its data."""

    name: str
    dtype: str  # torch's name, e.g. "bfloat16"
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * ITEMSIZE[self.dtype]


def count_parameters(tensors: Iterable[TensorInfo]) -> int:
    """Entries of all floating tensors, batch-norm statistics left out."""
    return sum(t.numel for t in tensors if "float" in t.dtype and not t.name.endswith(_STATISTICS))


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        MpocError: not a safetensors file, truncated, or with a dtype that is not known here.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LONGEST_HEADER:
            raise MpocError(f"{path}: not a safetensors file (no header)")
        text = file.read(length)
    if len(text) < length:
        raise MpocError(f"{path}: truncated in its header: {size} bytes, header of {length}")
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata that is not text")
        entries = {name: _entry(path, name, value) for name, value in raw.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MpocError(f"{path}: not a safetensors file (broken header: {error})") from error
    end = max((stop for _, stop in entries.values()), default=0)
    if size < 8 + length + end:
        missing = 8 + length + end - size
        last = max(entries, key=lambda name: entries[name][1])
        raise MpocError(f"{path}: truncated: {missing} bytes missing at its end (tensor {last!r})")
    return Header({name: info for name, (info, _) in entries.items()}, metadata)


def _entry(path: Path, name: str, value: dict[str, Any]) -> tuple[TensorInfo, int]:
    """A tensor's info and the offset behind its last byte."""
    if value["dtype"] not in DTYPES:
        raise MpocError(f"{path}: tensor {name!r} has dtype {value['dtype']}, not known here")
    info = TensorInfo(name, DTYPES[value["dtype"]][0], tuple(value["shape"]))
    start, stop = value["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*info.shape, start, stop))
    if not whole or stop - start != info.nbytes:
        raise MpocError(f"{path}: tensor {name!r}: offsets do not match its shape and dtype")
    return info, stop


def encode_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """Length and JSON for these tensors stored one after another; padded to 8 bytes with spaces."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for info in tensors:
        table[info.name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def storage_order(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Widest dtype first, then by name, as safetensors' own writer does: keeps every tensor aligned."""
    ranks = {dtype: rank for rank, dtype in enumerate(ITEMSIZE)}
    return sorted(tensors, key=lambda info: (ranks[info.dtype], info.name))
