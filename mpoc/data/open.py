"""Open a data set of any known format, checked, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mpoc.data.base import IN_MEMORY_BYTES, Data, Source
from mpoc.data.cifar import open_cifar
from mpoc.data.files import files_of, recognise
from mpoc.data.idx import open_idx
from mpoc.data.image_folder import open_image_folder
from mpoc.data.keyed import open_npz, open_safetensors_data
from mpoc.data.stream import open_text
from mpoc.data.tables import open_jsonl, open_parquet
from mpoc.data.text import TextOptions

_READERS: dict[str, Callable[[Source], Data]] = {
    "idx": open_idx,
    "cifar-binary": open_cifar,
    "image-folder": open_image_folder,
    "npz": open_npz,
    "safetensors": open_safetensors_data,
    "parquet": open_parquet,
    "jsonl": open_jsonl,
    "txt": open_text,
}


def open_data(
    path: Path,
    format: str | None = None,
    *,
    text: TextOptions | None = None,
    size: tuple[int, int] | None = None,
    limit: int = IN_MEMORY_BYTES,
) -> Data:
    """Open a file or a directory of data.

    Args:
        path: a file, or a directory with ``train…``, ``validation…`` and ``test…`` in it.
        format: one of ``FORMATS``; None to recognise it.
        text: how text becomes examples; None for blocks of 256 characters.
        size: (height, width) that encoded images are resized to as they are decoded; sets whose images
            differ in size need it.
        limit: bytes of decoded examples to hold in memory; a larger set is read from disk.

    Returns:
        The set, every label, count and shape of it checked.

    Raises:
        UsageError: nothing at ``path``, an unknown format, or several formats in the directory.
        MpocError: the data are bad, with the file and row.
    """
    form = recognise(path, format)
    files, notes = files_of(path, form)
    return _READERS[form](Source(path, files, tuple(notes), size, text, limit))
