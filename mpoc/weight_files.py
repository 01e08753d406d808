"""Which files of a directory hold its weights, and what is in them.  No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError
from mpoc.header import TensorInfo, read_header

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
        MpocError: none, several sets, or an index that names a missing file or one outside.
    """
    found = _find_weights(path)
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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MpocError(f"{index}: an index without a weight_map")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise MpocError(f"{index}: tensor {name!r} is put into {file!r}, outside the directory")
        if not (path / file).is_file():
            raise MpocError(
                f"{index}: shard {file} is missing (tensor {name!r} and others are in it)",
                "download the directory again, whole",
            )
        files[name] = path / file
    return files


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors in a directory of safetensors files, from their headers.

    Raises:
        MpocError: as :func:`weight_files_of`; or a file that is none or is broken.
    """
    files, wanted = weight_files_of(path)
    held = [info for file in files for info in read_header(file).tensors.values()]
    return {info.name: info for info in held if wanted is None or info.name in wanted}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MpocError: the file holds anything else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MpocError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise MpocError(f"{path}: a JSON object was expected")
    return value
