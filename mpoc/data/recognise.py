"""Recognise the format of a path and the split of each file, from names and first bytes alone."""

from __future__ import annotations

import re
from pathlib import Path

from mpoc.errors import MpocError, UsageError, nearest

# A word of a file's or folder's name → the split it names.
WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}
SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_BY_SUFFIX = {
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
}
FORMATS = ("idx", "cifar-binary", "image-folder", *dict.fromkeys(_BY_SUFFIX.values()))
_IDX = re.compile(r"images[-._]idx3[-._]ubyte(\.gz)?$")
_IDX_LABELS = re.compile(r"labels[-._]idx1[-._]ubyte(\.gz)?$")
_CIFAR = re.compile(r"(?P<split>data|test)_batch(_\d+)?\.bin$")
_PICKLED_CIFAR = re.compile(r"((data|test)_batch(_\d+)?|batches\.meta)$")
_NO_DATA = re.compile(r"(readme|license|licence|attribution|citation|requirements)", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """The split that a name contains: ``train-00000-of-00002.parquet`` → ``train``; None if it has none."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((WORDS[word] for word in words if word in WORDS), None)


def recognise(path: Path, wanted: str | None) -> str:
    """The format of a file or directory: ``wanted`` if it is given, else inferred from names.

    Raises:
        UsageError: nothing at ``path``, an unknown ``wanted``, or several formats in one directory.
        MpocError: no known format.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    if wanted is not None:
        if wanted not in FORMATS:
            raise UsageError(f"unknown format {wanted!r}{nearest(wanted, FORMATS)}", ", ".join(FORMATS))
        return wanted
    formats = sorted(_formats_in(path) if path.is_dir() else _format_of(path))
    if formats == ["image-folder", "txt"]:  # the text files are lists of file names and the like
        return "image-folder"
    if len(formats) > 1:
        raise UsageError(
            f"{path}: holds several formats: {', '.join(formats)}",
            f"choose one with --format, e.g. --format {formats[0]}, or name a file",
        )
    if not formats:
        raise MpocError(f"{path}: not a data set of a known format", f"known formats: {', '.join(FORMATS)}")
    return formats[0]


def _format_of(file: Path) -> set[str]:
    if _IDX.search(file.name):
        return {"idx"}
    if file.suffix == ".bin":
        return {"cifar-binary"}
    if file.suffix.lower() in _BY_SUFFIX:
        return {_BY_SUFFIX[file.suffix.lower()]}
    refuse_pickle(file)
    return set()


def _formats_in(path: Path) -> set[str]:
    formats = set()
    for file in _files_in(path):
        if _IDX.search(file.name):
            formats.add("idx")
        elif _CIFAR.search(file.name):
            formats.add("cifar-binary")
        elif _PICKLED_CIFAR.search(file.name):
            refuse_pickle(file)
        elif (
            file.suffix.lower() in _BY_SUFFIX
            and file.name != "batches.meta.txt"
            and not _NO_DATA.match(file.name)
        ):
            formats.add(_BY_SUFFIX[file.suffix.lower()])
    folders = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    if any(_holds_images(folder) for folder in folders):
        formats.add("image-folder")
    return formats


def _holds_images(folder: Path) -> bool:
    """Whether a split's or a class's folder holds images; rglob alone would not enter linked folders."""
    linked = (inner for inner in folder.iterdir() if inner.is_symlink() and inner.is_dir())
    return any(
        file.suffix.lower() in IMAGE_SUFFIXES for place in (folder, *linked) for file in place.rglob("*")
    )


def _files_in(path: Path) -> list[Path]:
    """Files of a directory and of the folders in it (``data/``, ``train/``), sorted, without hidden ones."""
    files = [file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return sorted(shown)


def files_of(path: Path, form: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split, and notes about files left out.

    A single file is the split that its name contains, else training data.  In a directory, files whose names
    contain no split are training data, unless other names contain one.

    Raises:
        MpocError: no file of this format, or two folders of one split.
    """
    if path.is_file():
        return {_split_of(path, form) or "train": [path]}, []
    if form == "image-folder":
        return _split_folders(path), []
    by_split: dict[str | None, list[Path]] = {}
    for file in _files_in(path):
        if _belongs(file, form):
            parts = file.relative_to(path).parts
            split = _split_of(file, form) or (split_of(parts[0]) if len(parts) > 1 else None)
            by_split.setdefault(split, []).append(file)
    if not by_split:
        raise MpocError(f"{path}: no file of format {form}")
    unnamed = by_split.pop(None, [])
    notes = []
    if unnamed and by_split:
        notes.append(f"ignored, no split in the name: {', '.join(file.name for file in unnamed[:5])}")
    elif unnamed:
        by_split["train"] = unnamed
    return {split: by_split[split] for split in SPLITS if split in by_split}, notes


def _split_of(file: Path, form: str) -> str | None:
    match = _CIFAR.search(file.name) if form == "cifar-binary" else None
    if match:
        return "train" if match["split"] == "data" else "test"
    return split_of(file.name)


def _belongs(file: Path, form: str) -> bool:
    if form == "idx":
        return bool(_IDX.search(file.name))
    if form == "cifar-binary":
        return bool(_CIFAR.search(file.name))
    return _BY_SUFFIX.get(file.suffix.lower()) == form and not _NO_DATA.match(file.name)


def is_data(file: Path, path: Path, wanted: str | None) -> bool:
    """Whether the data set at ``path`` is read from ``file``, by its name and folder."""
    if path.resolve() not in file.resolve().parents:
        return False
    form = recognise(path, wanted)
    if form == "image-folder":
        return file.suffix.lower() in IMAGE_SUFFIXES
    return _belongs(file, form) or (form == "idx" and bool(_IDX_LABELS.search(file.name)))


def _split_folders(path: Path) -> dict[str, list[Path]]:
    """The folders named after splits; the directory itself where there are none.

    Raises:
        MpocError: two folders of one split.
    """
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    named: dict[str, list[Path]] = {}
    for folder in folders:
        split = WORDS.get(folder.name.lower())
        if split in named:
            raise MpocError(
                f"{path}: {named[split][0].name} and {folder.name} are both {split}", "remove one"
            )
        if split is not None:
            named[split] = [folder]
    return {split: named[split] for split in SPLITS if split in named} or {"train": [path]}


def refuse_pickle(path: Path) -> None:
    """Refuse a Python pickle, such as CIFAR's python version: loading one runs code.

    Raises:
        MpocError: ``path`` is a pickle.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        what = (
            "a pickled CIFAR batch (the python version)"
            if _PICKLED_CIFAR.search(path.name)
            else "a Python pickle"
        )
        raise MpocError(
            f"{path}: {what}; loading it could run any code, so it was not loaded",
            "take the binary version (cifar-10-binary.tar.gz: data_batch_1.bin …), or save the arrays: "
            "numpy.savez(file, x=x, y=y)",
        )
