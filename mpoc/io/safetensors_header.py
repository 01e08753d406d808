"""The safetensors header: eight bytes of length, JSON, then raw tensor bytes.  No torch here.

``mpoc report`` reads nothing else, so it is quick on a file of any size. Reading and writing of checkpoints
share it.  The layout: https://huggingface.co/docs/safetensors (format section).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.foreign import foreign_file
from mpoc.io.validation import LONGEST, parse_strictly

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
# Floats of 4 to 8 bits that are stored with a scale for each block.
_BLOCK_DTYPES = ("F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "F4_E2M1", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CODES = {name: code for code, (name, _) in DTYPES.items()}
ITEMSIZE = dict(DTYPES.values())
# Far beyond any tensor that is: what is done with a name or a shape takes time by its length.
LONGEST_NAME = 1000
_MOST_AXES = 64
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
    """The header of a safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)  # name → offset of its first byte in the file


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        MpocError: not a safetensors file, truncated, or with a dtype that is not known here; tensors that
            share bytes, or bytes that belong to none.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # of this file, should another take its place meanwhile
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= LONGEST:
            raise foreign_file(path) or MpocError(f"{path}: not a safetensors file (no header)")
        if length > size - 8:
            said = f"{path}: truncated in its header: {size} bytes, header of {length}"
            raise foreign_file(path) or MpocError(said)
        text = file.read(length)
    try:
        raw = parse_strictly(text)
        metadata = raw.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata that is not text")
        entries = {name: _entry(path, name, value) for name, value in raw.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MpocError(f"{path}: not a safetensors file (broken header: {shortened(error)})") from error
    _check_bytes(path, entries, size - 8 - length)
    starts = {name: 8 + length + start for name, (_, (start, _)) in entries.items()}
    return Header({name: info for name, (info, _) in entries.items()}, metadata, starts)


def _entry(path: Path, name: str, value: dict[str, Any]) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor's info and the offsets of its first byte and behind its last."""
    if len(name) > LONGEST_NAME:
        raise MpocError(f"{path}: tensor {name[:40]!r}… has a name of {len(name)} characters")
    if value["dtype"] in _BLOCK_DTYPES:
        said = f"{path}: already quantised: blocks of {value['dtype']} (MX, NVFP4; tensor {name!r})"
        raise MpocError(said, "compress the unquantised checkpoint that it was made from")
    if value["dtype"] not in DTYPES:
        raise MpocError(f"{path}: tensor {name!r} has dtype {str(value['dtype'])[:40]}, not known here")
    shape = tuple(value["shape"][: _MOST_AXES + 1])
    start, stop = value["data_offsets"]
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop))
    info = TensorInfo(name, DTYPES[value["dtype"]][0], shape)
    if not whole or len(shape) > _MOST_AXES or stop - start != info.nbytes:
        raise MpocError(f"{path}: tensor {name!r}: offsets do not match its shape and dtype")
    return info, (start, stop)


def _check_bytes(path: Path, entries: dict[str, tuple[TensorInfo, tuple[int, int]]], size: int) -> None:
    """Every one of the ``size`` bytes behind the header must belong to one tensor.

    Raises:
        MpocError: one does not.
    """
    end, last = 0, ""
    for name, (_, (start, stop)) in sorted(entries.items(), key=lambda entry: entry[1][1]):
        if start != end:
            what = (
                f"begins inside tensor {last!r}" if start < end else f"leaves a hole of {start - end} bytes"
            )
            raise MpocError(f"{path}: tensor {name!r} {what}")
        end, last = stop, name
    if size < end:
        raise MpocError(f"{path}: truncated: {end - size} bytes missing at its end (tensor {last!r})")
    if size > end:
        raise MpocError(f"{path}: {size - end} bytes at its end belong to no tensor")


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
