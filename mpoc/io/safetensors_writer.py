"""Write safetensors files one tensor at a time.

The safetensors library writes from a dictionary that holds every tensor of a file. Here memory is bounded by
one tensor: the header is written first (sizes are known), then each tensor as it is read or computed. The
tests check this writer byte for byte with the library's own reader.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.atomic import staged
from mpoc.io.safetensors_header import TensorInfo, encode_header, read_header, storage_order


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; ``read`` gives its data when its turn comes."""

    info: TensorInfo
    read: Callable[[], Tensor]

    @staticmethod
    def of(name: str, tensor: Tensor) -> Entry:
        """A tensor that is in memory."""
        info = TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        return Entry(info, lambda: tensor)


def write_safetensors(
    path: Path, entries: list[Entry], metadata: dict[str, str], durable: bool = True
) -> None:
    """Write one file, ``durable`` to disk (fsync).

    Raises:
        MpocError: two entries of one name.
    """
    by_name = {entry.info.name: entry for entry in entries}
    if len(by_name) != len(entries):
        twice = sorted({e.info.name for e in entries if by_name[e.info.name] is not e})
        raise MpocError(f"{path.name}: two tensors would be named {twice[0]!r}")
    ordered = storage_order([entry.info for entry in entries])
    with path.open("wb") as file:
        file.write(encode_header(ordered, metadata))
        for info in ordered:
            _write_tensor(file, info, by_name[info.name].read())
        if durable:
            file.flush()
            os.fsync(file.fileno())


def replace_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Replace entries of a file's metadata; its tensors and their order stay."""
    header = read_header(path)
    ordered = sorted(header.tensors.values(), key=lambda info: header.starts[info.name])
    with staged(path) as target, path.open("rb") as old, target.open("wb") as new:
        new.write(encode_header(ordered, header.metadata | metadata))
        old.seek(min(header.starts.values(), default=0))
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def _write_tensor(file: BinaryIO, info: TensorInfo, tensor: Tensor) -> None:
    assert tuple(tensor.shape) == info.shape, f"{info.name}: {tuple(tensor.shape)} for {info.shape}"
    assert str(tensor.dtype) == f"torch.{info.dtype}", f"{info.name}: {tensor.dtype} for {info.dtype}"
    file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() < 2:  # torch gives any stride to a single number
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Shard:
    """One file of a sharded checkpoint."""

    name: str
    entries: list[Entry]


def plan_shards(entries: list[Entry], max_bytes: int, stem: str = "model") -> list[Shard]:
    """Fill files in order up to ``max_bytes`` each; a tensor that is larger gets a file of its own.

    Args:
        entries: the tensors.
        max_bytes: of one file.
        stem: how the files are named, as ``model-00001-of-00002.safetensors``.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.info.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.info.nbytes
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [
        Shard(f"{stem}-{k:05d}-of-{count:05d}.safetensors", group) for k, group in enumerate(groups, start=1)
    ]
