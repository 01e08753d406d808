"""Files of arrays: ``.npy``, ``.npz``, ``.safetensors``, IDX and CIFAR-10's binary version.

``.npz`` and ``.safetensors`` hold arrays under names.  One file is one split (``x``, ``y``), or several
(``x_train``, ``y_train``, ``x_test``, … as Keras and ``train_images``, ``train_labels``, … as MedMNIST name
them); token ids are called ``input_ids``, with ``attention_mask``.  An array that is alone in its file may
have any name, and a ``.npy`` holds one array; integers (n, T) are token ids there, anything else is x.

IDX, the format of MNIST, is a magic number, the sizes big-endian, then the bytes; plain or gzipped
(http://yann.lecun.com/exdb/mnist/).  Fashion-MNIST, KMNIST and EMNIST use it too.  CIFAR-10's binary version
is rows of 3073 bytes: a label and 32×32 pixels, red plane, green plane, blue plane
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpoc.data.arrays import Part, assemble, check_counts, label_columns, row_finder
from mpoc.data.base import Data, DataSource
from mpoc.data.documents import StoredTokens, assemble_tokens
from mpoc.data.recognise import WORDS, refuse_pickle
from mpoc.errors import MpocError

Array = NDArray[np.generic]

# The name of an array, without the word that names its split → its role.
_ROLES = {
    **dict.fromkeys(("x", "images", "inputs", "data", "features"), "x"),
    **dict.fromkeys(("y", "labels", "label", "targets", "target"), "y"),
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
}
_TORCH_DTYPES = "?bBhHiIlLqQefd"  # numpy's letters of the dtypes that torch has
_LOCAL_HEADER = 30  # bytes of the local header of a zip member, before its name

NAMES = re.compile(r"(?P<kind>images|labels)[-._]idx(?P<dimensions>[13])[-._]ubyte(\.gz)?$")
_UBYTE = 8  # the third byte of the magic number: unsigned bytes

SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes
_CLASSES = 10


def open_npy(source: DataSource) -> Data:
    """Open ``.npy`` files, one array each; mapped.

    Raises:
        MpocError: pickled objects, a damaged file, or what :func:`assemble` or :func:`assemble_tokens`
        refuses.
    """
    return _open(source, "npy", _read_npy)


def open_npz(source: DataSource) -> Data:
    """Open ``.npz`` files; arrays are mapped where ``numpy.savez`` wrote them, else unpacked.

    Raises:
        MpocError: no inputs, pickled objects, a damaged file, or what the assembly refuses.
    """
    return _open(source, "npz", _read_npz)


def open_safetensors_data(source: DataSource) -> Data:
    """Open ``.safetensors`` files; tensors are mapped.

    Raises:
        MpocError: no inputs, a damaged file, or what the assembly refuses.
    """
    return _open(source, "safetensors", _read_safetensors)


def _open(source: DataSource, form: str, read: Callable[[Path], dict[str, Tensor]]) -> Data:
    parts = _parts(source, read)
    first = next(iter(parts.values()))[0]
    if not first.is_tokens:
        return assemble(source, form, parts)
    tokens = {split: _stored_tokens(held, first) for split, held in parts.items()}
    return assemble_tokens(source, form, tokens, label_columns(parts), ())


def _parts(source: DataSource, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, list[Part]]:
    """The arrays of every split."""
    parts: dict[str, list[Part]] = {}
    for split, files in source.files.items():
        for file in files:
            arrays = read(file)
            for split_inside, names in _roles(file, arrays).items():
                parts.setdefault(split_inside or split, []).append(_part(file, arrays, names))
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


def _part(file: Path, arrays: dict[str, Tensor], names: dict[str, str]) -> Part:
    """The examples of one split of a file; ``names`` gives the name of the array in each role."""
    name = names.get("input_ids") or names["x"]
    x = arrays[name]
    if x.ndim == 0:
        raise MpocError(f"{file}: {name} is a single number; one row per example was expected")
    y = _plain(file, names["y"], arrays[names["y"]]) if "y" in names else None
    mask = arrays[names["attention_mask"]] if "attention_mask" in names else None
    return Part(str(file), x, y, name, mask=mask, is_tokens="input_ids" in names)


def _stored_tokens(held: list[Part], first: Part) -> StoredTokens:
    """The token ids of a split; the files may have rows of different lengths."""
    for part in held:
        _check_tokens(part, first)
    where = row_finder(held)
    lengths = np.concatenate([np.full(len(part.x), part.x.shape[1]) for part in held])
    ids = np.concatenate([part.x.numpy().astype(np.int64).ravel() for part in held])
    masks = [part.mask.numpy().astype(np.int64).ravel() for part in held if part.mask is not None]
    return StoredTokens(ids, lengths, np.concatenate(masks) if masks else None, where)


def _check_tokens(part: Part, first: Part) -> None:
    actual = f"{tuple(part.x.shape)} {_dtype_name(part.x)}"
    if not part.is_tokens or part.x.ndim != 2 or not _holds_integers(part.x):
        raise MpocError(f"{part.name}: {part.x_name} is {actual}; integers (n, tokens) were expected")
    if (part.mask is None) != (first.mask is None):
        lacking = part if part.mask is None else first
        raise MpocError(f"{lacking.name}: no attention_mask, but other files have one")
    if part.mask is not None and (part.mask.shape != part.x.shape or part.mask.is_floating_point()):
        mask = f"{tuple(part.mask.shape)} {_dtype_name(part.mask)}"
        raise MpocError(
            f"{part.name}: attention_mask is {mask}; integers {tuple(part.x.shape)} were expected"
        )
    if (part.y is None) != (first.y is None):
        raise MpocError(f"{(part if part.y is None else first).name}: no labels, but other files have them")
    check_counts(part)


def _holds_integers(array: Tensor) -> bool:
    return not array.is_floating_point() and array.dtype != torch.bool


def _dtype_name(array: Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def _plain(file: Path, name: str, y: Tensor) -> Array:
    """Labels as an array in memory, (n, …)."""
    if y.ndim == 0:
        raise MpocError(f"{file}: {name} is a single number; one label per example was expected")
    values: Array = (y.float() if y.dtype == torch.bfloat16 else y).numpy().copy()
    return values


def _roles(file: Path, arrays: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Split ("" where the names do not say) → role ("x", "y", "input_ids", …) → name of the array.

    Raises:
        MpocError: no inputs, or two arrays of one role.
    """
    by_split: dict[str, dict[str, str]] = {}
    for name in sorted(arrays):
        words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
        split = next((WORDS[word] for word in words if word in WORDS), "")
        role = _ROLES.get("_".join(word for word in words if word not in WORDS), "")
        if len(arrays) == 1 and not role:
            role = "input_ids" if _are_token_ids(arrays[name]) else "x"
        roles = by_split.setdefault(split, {})
        if role in roles:
            raise MpocError(f"{file}: both {roles[role]!r} and {name!r} could be {role}")
        if role:
            roles[role] = name
    inputs = {split: roles for split, roles in by_split.items() if "x" in roles or "input_ids" in roles}
    for roles in inputs.values():
        if "x" in roles and "input_ids" in roles:
            raise MpocError(f"{file}: both {roles['x']!r} and {roles['input_ids']!r} could be the inputs")
    if not inputs:
        listed = ", ".join(sorted(arrays)[:6]) or "nothing"
        raise MpocError(f"{file}: no array named x or input_ids (found: {listed})", "name the arrays x and y")
    return inputs


def _are_token_ids(array: Tensor) -> bool:
    """Whether an array without a telling name is token ids (n, T): integers of more than 8 bits."""
    return array.ndim == 2 and _holds_integers(array) and array.dtype.itemsize > 1


def _read_npy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _npy_header(path, "the array", file)
            offset = file.tell()
        array = (
            np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C") if 0 not in shape else None
        )
    except (OSError, EOFError, ValueError) as error:
        raise MpocError(f"{path}: not an .npy file, or a truncated or damaged one ({error})") from error
    return {"the array": _tensor(path, "the array", np.empty(shape, dtype) if array is None else array)}


def _npy_header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order (whether Fortran's) and dtype of the array that ``file`` begins with.

    Raises:
        MpocError: it holds pickled objects.
        ValueError: not in the format of ``.npy``.
    """
    version = npy.read_magic(file)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise MpocError(
            f"{path}: {name} holds pickled objects; loading them could run any code",
            "save plain numbers: numpy.savez(file, x=x, y=y) with numeric arrays",
        )
    return shape, fortran, dtype


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            arrays = {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, struct.error) as error:
        raise MpocError(f"{path}: not an .npz file, or a truncated or damaged one ({error})") from error
    return {name: _tensor(path, f"array {name!r}", array) for name, array in arrays.items()}


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """One array of the archive: mapped where it is stored uncompressed, else unpacked."""
    name = f"array {info.filename.removesuffix('.npy')!r}"
    with archive.open(info) as file:
        shape, fortran, dtype = _npy_header(path, name, file)
        if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
            file.seek(0)
            unpacked: Array = npy.read_array(file, allow_pickle=False)
            return unpacked
        header = file.tell()
    with path.open("rb") as raw:
        raw.seek(info.header_offset + _LOCAL_HEADER - 4)
        name_length, extra_length = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + _LOCAL_HEADER + name_length + extra_length + header
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")


def _tensor(path: Path, name: str, array: Array) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.char not in _TORCH_DTYPES:
        raise MpocError(f"{path}: {name} is of type {array.dtype}; numbers were expected")
    return torch.from_numpy(array)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise MpocError(f"{path}: not a .safetensors file, or a truncated one ({error})") from error


def open_idx(source: DataSource) -> Data:
    """Open ``…-images-idx3-ubyte`` with the labels from ``…-labels-idx1-ubyte`` beside it.

    Raises:
        MpocError: several sets, missing labels, a truncated file or none in IDX format, counts that differ.
    """
    parts = {split: [_pair(_only(split, files))] for split, files in source.files.items()}
    return assemble(source, "idx", parts)


def _only(split: str, files: list[Path]) -> Path:
    """The file of a split; where it is there plain and gzipped (torchvision leaves both), the plain one.

    Raises:
        MpocError: several sets, such as the letters and digits of EMNIST.
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
    """The file of the labels beside a file of images.

    Raises:
        MpocError: it is not named like one, or there are no labels beside it.
    """
    match = NAMES.search(images.name)
    if match is None or match["kind"] != "images":
        raise MpocError(f"{images}: not named like IDX images (train-images-idx3-ubyte, with .gz or without)")
    plain = images.name.removesuffix(".gz")
    plain = plain.replace("images", "labels").replace("idx3", "idx1")
    for name in (plain, f"{plain}.gz"):
        if images.with_name(name).is_file():
            return images.with_name(name)
    raise MpocError(f"{images}: no labels beside it: {plain} or {plain}.gz was expected")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes; a plain file is mapped, a gzipped one unpacked.

    Raises:
        MpocError: not IDX, another type or number of dimensions, or more or fewer bytes than the header says.
    """
    content: NDArray[np.uint8]
    if path.suffix == ".gz":
        try:
            content = np.frombuffer(bytearray(gzip.decompress(path.read_bytes())), np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise MpocError(f"{path}: truncated or damaged ({error})", "download it again") from error
    elif path.stat().st_size == 0:
        raise MpocError(f"{path}: empty file")
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
        raise MpocError(
            f"{path}: {len(content) - start - math.prod(shape):,} bytes more than its header says"
        )
    return content[start:].reshape(shape)


def open_cifar(source: DataSource) -> Data:
    """Open ``data_batch_1.bin``, … and ``test_batch.bin``; ``batches.meta.txt`` may name the classes.

    Raises:
        MpocError: a pickled batch, a file that is not whole rows, a label above 9.
    """
    parts = {split: [_read_cifar(file) for file in files] for split, files in source.files.items()}
    first = next(iter(source.files.values()))[0]
    return assemble(source, "cifar-binary", parts, _class_names(first.with_name("batches.meta.txt")))


def _read_cifar(path: Path) -> Part:
    refuse_pickle(path)
    size = path.stat().st_size
    if size == 0 or size % ROW:
        raise MpocError(
            f"{path}: {size:,} bytes are not whole CIFAR-10 rows of {ROW} ({size % ROW} left over)",
            "the file is truncated, or of another set: the rows of CIFAR-100 differ",
        )
    rows = np.memmap(path, np.uint8, mode="c").reshape(-1, ROW)  # copy-on-write: torch wants writable memory
    return Part(str(path), torch.from_numpy(rows[:, 1:].reshape(-1, *SHAPE)), np.array(rows[:, 0]))


def _class_names(path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text("utf-8").split()) if path.is_file() else ()
    return names if len(names) == _CLASSES else tuple(map(str, range(_CLASSES)))
