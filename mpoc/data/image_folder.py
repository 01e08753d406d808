"""A folder a class, an image a file: ``train/<class>/*``, ``test/<class>/*``, or ``<class>/*`` alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpoc.data.base import Data, Source
from mpoc.data.encoded import assemble_images
from mpoc.data.files import IMAGE_SUFFIXES, SPLITS
from mpoc.data.labels import Column, Where
from mpoc.data.rows import FileRows, Rows
from mpoc.errors import MpocError


def open_image_folder(source: Source) -> Data:
    """Classes are the training folders' names, sorted.

    Raises:
        MpocError: no class folders, an empty one, a class that training lacks, or a bad image.
    """
    folders = {split: class_folders(held[0]) for split, held in source.files.items()}
    first = next(split for split in SPLITS if split in folders)
    names = tuple(sorted(folders[first]))
    rows: dict[str, Rows[bytes]] = {}
    columns: dict[str, tuple[Column, Where]] = {}
    for split, classes in folders.items():
        unknown = sorted(classes.keys() - set(names))
        if unknown:
            raise MpocError(
                f"{classes[unknown[0]][0].parent}: class {unknown[0]!r} is not among those of {first}"
            )
        held = FileRows([file for name in sorted(classes) for file in classes[name]])
        numbers = [names.index(name) for name in sorted(classes)]
        labels = np.repeat(np.array(numbers), [len(classes[name]) for name in sorted(classes)])
        rows[split], columns[split] = held, (labels, held.name)
    return assemble_images(source, "image-folder", rows, columns, names)


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class → its image files, sorted, those in deeper folders included.

    Raises:
        MpocError: no folder, no class folders, or an empty one.
    """
    classes = {}
    if not folder.is_dir():
        raise MpocError(f"{folder}: not a folder", "name the folder that holds train/ or the class folders")
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or place.name.startswith("."):
            continue
        files = [
            file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        ]
        if not files:
            raise MpocError(f"{place}: no image in this class folder", "put images into it, or remove it")
        classes[place.name] = sorted(files)
    if not classes:
        raise MpocError(f"{folder}: no class folders in it", "one folder a class: train/<class>/*.png")
    return classes
