"""Which files of a directory hold its weights, and what is in them.  No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.safetensors_header import TensorInfo, read_header
from mpoc.io.validation import parse_strictly, read_bounded

# The weights of a directory, first match first, as transformers looks: safetensors before pickles.
_PATTERNS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.bin.index.json",
)


def weight_files_of(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The weight files of a directory, and which tensor lies in which where an index says so.

    Raises:
        MpocError: none, several sets, an index that names a missing file, or a file outside the directory.
    """
    found = _find_weights(path)
    check_inside(path, found)
    if not found.name.endswith(".index.json"):
        return [found], None
    wanted = _read_index(path, found)
    return sorted(set(wanted.values())), wanted


def _find_weights(path: Path) -> Path:
    for pattern in _PATTERNS:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise MpocError(
                f"{path}: {len(found)} weight files and no index that says which belong together ({names})",
                "name one of the files instead of the directory",
            )
    raise MpocError(f"{path}: no weights in this directory (looked for {', '.join(_PATTERNS[:2])}, …)")


def _read_index(path: Path, index: Path) -> dict[str, Path]:
    """Tensor name → file, every file checked to lie in the directory and to exist."""
    weight_map = read_json(index, parse_strictly).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MpocError(f"{index}: an index without a weight_map")
    files: dict[str, Path] = {}
    checked: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            said = shortened(file)
            raise MpocError(f"{index}: tensor {name!r} is put into {said}, outside the directory")
        files[name] = path / file
        if file in checked:
            continue
        if not (path / file).is_file():
            raise MpocError(
                f"{index}: shard {file} is missing (tensor {name!r} and others are in it)",
                "download the directory again, whole",
            )
        check_inside(path, path / file)
        checked.add(file)
    return files


def _is_plain(file: str) -> bool:
    """Whether this can be the name of a file in a directory, on any system."""
    return (
        file.isprintable() and file not in ("", ".", "..") and not set("/\\") & set(file) and len(file) < 200
    )


def check_inside(directory: Path, file: Path) -> None:
    """Refuse a link that leads out of the directory, but to where a hub cache keeps what its links mean.

    Raises:
        MpocError: it does.
    """
    root, meant = Path(os.path.realpath(directory)), Path(os.path.realpath(file))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (meant.is_relative_to(root) or meant.is_relative_to(blobs)):
        raise MpocError(
            f"{file}: a link to {meant}, outside the directory",
            "put the file itself in its place, if you trust where the directory came from",
        )


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors in a directory of safetensors files, from their headers.

    Raises:
        MpocError: as :func:`weight_files_of`; or a file that is none or is broken.
    """
    files, wanted = weight_files_of(path)
    held = [info for file in files for info in read_header(file).tensors.values()]
    return {info.name: info for info in held if wanted is None or info.name in wanted}


def read_json(path: Path, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """A JSON object, of a bounded size.

    Raises:
        MpocError: the file holds anything else.
    """
    try:
        value = parse(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise MpocError(f"{path}: not valid JSON ({shortened(error)})") from error
    if not isinstance(value, dict):
        raise MpocError(f"{path}: a JSON object was expected")
    return value


def output_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
