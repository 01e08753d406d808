"""Find the weight files of a directory and read which tensors they hold, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.safetensors_header import TensorInfo, read_header
from mpoc.io.validation import parse_strictly, read_bounded

# Patterns of weight files in the order in which transformers looks for them: safetensors before pickles.
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
    """The weight files of a directory and, from its index if there is one, tensor name → file.

    Raises:
        MpocError: there are no weights or several sets, or the index names a file that is missing or lies
            outside the directory.
    """
    weights = _find_weights(path)
    check_inside(path, weights)
    if not weights.name.endswith(".index.json"):
        return [weights], None
    file_of = _read_index(path, weights)
    return sorted(set(file_of.values())), file_of


def _find_weights(path: Path) -> Path:
    for pattern in _PATTERNS:
        matches = sorted(path.glob(pattern))
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(file.name for file in matches[:4])
            raise MpocError(
                f"{path}: {len(matches)} weight files and no index that says which belong together ({names})",
                "name one of the files instead of the directory",
            )
    raise MpocError(f"{path}: no weights in this directory (looked for {', '.join(_PATTERNS[:2])}, …)")


def _read_index(path: Path, index: Path) -> dict[str, Path]:
    """Tensor name → file, after checking that every file exists and lies in the directory."""
    weight_map = read_json(index, parse_strictly).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MpocError(f"{index}: the index has no weight_map")
    files: dict[str, Path] = {}
    checked: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise MpocError(f"{index}: tensor {name!r} is in {shortened(file)}, outside the directory")
        files[name] = path / file
        if file in checked:
            continue
        if not (path / file).is_file():
            raise MpocError(
                f"{index}: shard {file} is missing (tensor {name!r} and others are in it)",
                "download the whole directory again",
            )
        check_inside(path, path / file)
        checked.add(file)
    return files


def _is_plain(file: str) -> bool:
    """Whether ``file`` is a plain file name, without a folder, on any system."""
    return (
        file.isprintable() and file not in ("", ".", "..") and not set("/\\") & set(file) and len(file) < 200
    )


def check_inside(directory: Path, file: Path) -> None:
    """Refuse a link that leads out of the directory, except to the blobs of a Hugging Face cache.

    Raises:
        MpocError: ``file`` is such a link.
    """
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(file))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise MpocError(
            f"{file}: a link to {target}, outside the directory",
            "replace the link by the file, if you trust the source of the directory",
        )


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors in a directory of safetensors files, from their headers.

    Raises:
        MpocError: as :func:`weight_files_of`, or a file is not safetensors or is damaged.
    """
    files, file_of = weight_files_of(path)
    infos = [info for file in files for info in read_header(file).tensors.values()]
    return {info.name: info for info in infos if file_of is None or info.name in file_of}


def read_json(path: Path, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        MpocError: the file is too large, is not valid JSON, or holds no object.
    """
    try:
        value = parse(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise MpocError(f"{path}: not valid JSON ({shortened(error)})") from error
    if not isinstance(value, dict):
        raise MpocError(f"{path}: not a JSON object")
    return value


def output_bytes(path: Path) -> int:
    """Size in bytes of a file, or of all files in a directory."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
