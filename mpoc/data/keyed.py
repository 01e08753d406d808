"""Arrays under names: ``.npz`` and ``.safetensors`` files that hold x and y.

A file holds one split (``x``, ``y``), or several (``x_train``, ``y_train``, ``x_test``, … as Keras and
``train_images``, ``train_labels``, … as MedMNIST name them).
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpoc.data.arrays import Part, assemble
from mpoc.data.base import Data, Source
from mpoc.data.files import WORDS
from mpoc.errors import MpocError

_INPUTS = ("x", "images", "inputs", "data", "features")
_LABELS = ("y", "labels", "label", "targets", "target")
Array = NDArray[np.generic]
_TORCH_DTYPES = "?bBhHiIlLqQefd"  # numpy's letters of what torch can hold


def open_npz(source: Source) -> Data:
    """Arrays of ``.npz`` files; mapped where ``numpy.savez`` wrote them (``savez_compressed``: unpacked).

    Raises:
        MpocError: no x in it, pickled objects, a damaged file, or what :func:`assemble` refuses.
    """
    return assemble(source, "npz", _parts(source, _read_npz))


def open_safetensors_data(source: Source) -> Data:
    """Tensors of ``.safetensors`` files, mapped.

    Raises:
        MpocError: no x in it, a damaged file, or what :func:`assemble` refuses.
    """
    return assemble(source, "safetensors", _parts(source, _read_safetensors))


def _parts(source: Source, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for split, files in source.files.items():
        for file in files:
            arrays = read(file)
            for inner, (x, y) in _roles(file, arrays).items():
                labels = None if y is None else _plain(file, y, arrays[y])
                if arrays[x].ndim == 0:
                    raise MpocError(f"{file}: {x} is a single number, not one row an example")
                parts.setdefault(inner or split, []).append(Part(str(file), arrays[x], labels, x))
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


def _plain(file: Path, name: str, y: Tensor) -> Array:
    """Labels as an array in memory, with a row an example."""
    if y.ndim == 0:
        raise MpocError(f"{file}: {name} is a single number, not one label an example")
    values: Array = (y.float() if y.dtype == torch.bfloat16 else y).numpy().copy()
    return values


def _roles(file: Path, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Split ("" where the names do not say) → the names of its inputs and of its labels."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
        split = next((WORDS[word] for word in words if word in WORDS), "")
        rest = "_".join(word for word in words if word not in WORDS)
        role = "x" if rest in _INPUTS else "y" if rest in _LABELS else ""
        if role in found.setdefault(split, {}):
            raise MpocError(f"{file}: both {found[split][role]!r} and {name!r} could be {role}")
        if role:
            found[split][role] = name
    roles = {split: (held["x"], held.get("y")) for split, held in found.items() if "x" in held}
    if not roles:
        listed = ", ".join(sorted(names)[:6]) or "nothing"
        raise MpocError(f"{file}: no array named x (found: {listed})", "name the arrays x and y")
    return roles


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            arrays = {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, struct.error) as error:
        raise MpocError(f"{path}: not an .npz file, or a truncated or damaged one ({error})") from error
    return {name: _tensor(path, name, array) for name, array in arrays.items()}


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """One array of the archive: mapped where it is stored as it is, else unpacked."""
    with archive.open(info) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise MpocError(
                f"{path}: array {info.filename.removesuffix('.npy')!r} holds pickled objects; "
                "loading them could run any code",
                "save plain numbers: numpy.savez(file, x=x, y=y) with numeric arrays",
            )
        if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
            file.seek(0)
            unpacked: Array = npy.read_array(file, allow_pickle=False)
            return unpacked
        inside = file.tell()
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name + extra + inside  # 30: the local header of a zip member
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")


def _tensor(path: Path, name: str, array: Array) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.char not in _TORCH_DTYPES:
        raise MpocError(f"{path}: array {name!r} is of type {array.dtype}; numbers were expected")
    return torch.from_numpy(array)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise MpocError(f"{path}: not a .safetensors file, or a truncated one ({error})") from error
