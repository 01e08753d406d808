"""IDX, the format of MNIST: a magic number, the sizes big-endian, then the bytes; plain or gzipped.

http://yann.lecun.com/exdb/mnist/ gives the layout.  Fashion-MNIST, KMNIST and EMNIST use it too.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpoc.data.arrays import Part, assemble
from mpoc.data.base import Data, Source
from mpoc.errors import MpocError

NAMES = re.compile(r"(?P<kind>images|labels)[-._]idx(?P<dimensions>[13])[-._]ubyte(\.gz)?$")
_UBYTE = 8  # the third byte of the magic number: unsigned bytes


def open_idx(source: Source) -> Data:
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
