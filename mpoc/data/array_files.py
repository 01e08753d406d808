"""Arrays under names: ``.npz`` and ``.safetensors`` files that hold x and y.

A file holds one split (``x``, ``y``), or several (``x_train``, ``y_train``, ``x_test``, … as Keras and
``train_images``, ``train_labels``, … as MedMNIST name them).

IDX, the format of MNIST: a magic number, the sizes big-endian, then the bytes; plain or gzipped.

http://yann.lecun.com/exdb/mnist/ gives the layout.  Fashion-MNIST, KMNIST and EMNIST use it too.

CIFAR-10's binary version: rows of 3073 bytes, a label and 32×32 pixels, red plane, green plane, blue.

https://www.cs.toronto.edu/~kriz/cifar.html gives the layout.
"""

from __future__ import annotations

import gzip
import math
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
from mpoc.data.base import Data, DataSource
from mpoc.data.recognise import WORDS, refuse_pickle
from mpoc.errors import MpocError

_INPUTS = ("x", "images", "inputs", "data", "features")
_LABELS = ("y", "labels", "label", "targets", "target")
Array = NDArray[np.generic]
_TORCH_DTYPES = "?bBhHiIlLqQefd"  # numpy's letters of what torch can hold

NAMES = re.compile(r"(?P<kind>images|labels)[-._]idx(?P<dimensions>[13])[-._]ubyte(\.gz)?$")
_UBYTE = 8  # the third byte of the magic number: unsigned bytes

SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes
_CLASSES = 10


def open_npz(source: DataSource) -> Data:
    """Arrays of ``.npz`` files; mapped where ``numpy.savez`` wrote them (``savez_compressed``: unpacked).

    Raises:
        MpocError: no x in it, pickled objects, a damaged file, or what :func:`assemble` refuses.
    """
    return assemble(source, "npz", _parts(source, _read_npz))


def open_safetensors_data(source: DataSource) -> Data:
    """Tensors of ``.safetensors`` files, mapped.

    Raises:
        MpocError: no x in it, a damaged file, or what :func:`assemble` refuses.
    """
    return assemble(source, "safetensors", _parts(source, _read_safetensors))


def _parts(source: DataSource, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, list[Part]]:
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


def open_idx(source: DataSource) -> Data:
    """Images from ``…-images-idx3-ubyte`` with the labels from ``…-labels-idx1-ubyte`` beside them.

    Raises:
        MpocError: several sets, labels missing, a file truncated or no IDX file, counts that differ.
    """
    parts = {split: [_pair(_only(split, files))] for split, files in source.files.items()}
    return assemble(source, "idx", parts)


def _only(split: str, files: list[Path]) -> Path:
    """The file of a split; of the same file plain and packed (torchvision leaves both) the plain one.

    Raises:
        MpocError: several, which are different sets, as EMNIST's letters and digits.
    """
    plain = [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]
    if len(plain) > 1:
        raise MpocError(
            f"{plain[0].parent}: {len(plain)} sets of {split} images: {', '.join(f.name for f in plain)}",
            "put each set in a folder of its own",
        )
    return plain[0]


def _pair(images: Path) -> Part:
    labels = labels_of(images)
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise MpocError(f"{images}: {len(x):,} images, but {labels.name} has {len(y):,} labels")
    return Part(str(images), torch.from_numpy(x), y, "images", str(labels))


def labels_of(images: Path) -> Path:
    """The labels beside a file of images.

    Raises:
        MpocError: it is not named like one, or has none beside it.
    """
    found = NAMES.search(images.name)
    if found is None or found["kind"] != "images":
        raise MpocError(f"{images}: not named like IDX images (train-images-idx3-ubyte, with .gz or without)")
    plain = images.name.removesuffix(".gz")
    plain = plain.replace("images", "labels").replace("idx3", "idx1")
    for name in (plain, f"{plain}.gz"):
        if images.with_name(name).is_file():
            return images.with_name(name)
    raise MpocError(f"{images}: its labels are missing: {plain}, with .gz or without, beside it")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes; a plain file is mapped, a gzipped one unpacked.

    Raises:
        MpocError: not IDX, another type or number of dimensions, or not as many bytes as its header says.
    """
    content: NDArray[np.uint8]
    if path.suffix == ".gz":
        try:
            content = np.frombuffer(bytearray(gzip.decompress(path.read_bytes())), np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise MpocError(f"{path}: truncated or damaged ({error})", "download it again") from error
    elif path.stat().st_size == 0:
        raise MpocError(f"{path}: an empty file")
    else:
        content = np.memmap(path, np.uint8, mode="c")  # copy-on-write: torch wants writable memory
    start = 4 + 4 * dimensions
    magic = bytes(content[:4])
    if magic != bytes([0, 0, _UBYTE, dimensions]):
        raise MpocError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions (begins {magic.hex(' ')})"
        )
    shape = tuple(int(n) for n in np.frombuffer(bytes(content[4:start]), ">u4"))
    if len(shape) < dimensions or len(content) - start < math.prod(shape):
        raise MpocError(
            f"{path}: truncated: {max(0, len(content) - start):,} bytes of data where its header says "
            f"{'×'.join(map(str, shape))}",
            "download it again",
        )
    if len(content) - start > math.prod(shape):
        raise MpocError(f"{path}: {len(content) - start - math.prod(shape):,} bytes too many for its header")
    return content[start:].reshape(shape)


def open_cifar(source: DataSource) -> Data:
    """``data_batch_1.bin`` … and ``test_batch.bin``; class names from ``batches.meta.txt`` where it is there.

    Raises:
        MpocError: a pickled batch, a file that is not whole rows, a label above 9.
    """
    parts = {split: [_read(file) for file in files] for split, files in source.files.items()}
    first = next(iter(source.files.values()))[0]
    return assemble(source, "cifar-binary", parts, _names(first.with_name("batches.meta.txt")))


def _read(path: Path) -> Part:
    refuse_pickle(path)
    size = path.stat().st_size
    if size == 0 or size % ROW:
        raise MpocError(
            f"{path}: {size:,} bytes are not whole CIFAR-10 rows of {ROW} ({size % ROW} left over)",
            "truncated, or another set: CIFAR-100 has other rows",
        )
    rows = np.memmap(path, np.uint8, mode="c").reshape(-1, ROW)  # copy-on-write: torch wants writable memory
    return Part(str(path), torch.from_numpy(rows[:, 1:].reshape(-1, *SHAPE)), np.array(rows[:, 0]))


def _names(path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text("utf-8").split()) if path.is_file() else ()
    return names if len(names) == _CLASSES else tuple(map(str, range(_CLASSES)))
