"""Which data set this is, by its files: their names, sizes and a bounded part of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mpoc.data.files import files_of
from mpoc.data.idx import labels_of
from mpoc.data.image_folder import class_folders

READ_AT_MOST = 1 << 26
"""Bytes that are read in all: a set of at most so many is read whole, of each file of a larger one an equal
share, half at its beginning and half at its end."""


def fingerprint(path: Path, form: str) -> str:
    """BLAKE2 over the files of a data set, 16 hexadecimal digits; the name of ``path`` itself is left out.

    Args:
        path: file or directory.
        form: its format.

    Raises:
        MpocError: no such files.
        OSError: of reading.
    """
    files = sorted(_files(path, form))
    sizes = [file.stat().st_size for file in files]
    whole = sum(sizes) <= READ_AT_MOST
    found = hashlib.blake2b(digest_size=8)
    for file, size in zip(files, sizes, strict=True):
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        found.update(repr((name, size)).encode())
        found.update(_ends(file, size, size if whole else READ_AT_MOST // (2 * len(files))))
    return found.hexdigest()


def _files(path: Path, form: str) -> set[Path]:
    files = [file for held in files_of(path, form)[0].values() for file in held]
    if form == "image-folder":
        return {file for folder in files for held in class_folders(folder).values() for file in held}
    return set(files) | ({labels_of(file) for file in files} if form == "idx" else set())


def _ends(file: Path, size: int, count: int) -> bytes:
    """The first and the last ``count`` bytes; all, once, where they would meet."""
    with file.open("rb") as content:
        if size <= 2 * count:
            return content.read()
        first = content.read(count)
        content.seek(size - count)
        return first + content.read(count)
