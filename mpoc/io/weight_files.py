"""Find the weight files of a directory and read which tensors they hold, without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, command_line, shortened
from mpoc.io.foreign import distributed_checkpoint, foreign_file
from mpoc.io.safetensors_header import TensorInfo, read_header
from mpoc.io.validation import parse_strictly, read_bounded

# Patterns of weight files in the order in which libraries look for them: the names of transformers, diffusers
# and open_clip before any other, among them safetensors before pickles and one file before shards.
_PATTERNS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "*.safetensors.index.json",
    "*.safetensors.index.*.json",
    "*.safetensors",
    "*.bin.index.json",
    "*.bin.index.*.json",
    "*pytorch_model.*.bin",
)
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_SHARD = re.compile(
    r"(?P<stem>.+?)-(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>(\.[\w-]+)*\.(safetensors|bin))$"
)
_PART = re.compile(r"^consolidated\.\d+\.pth$")  # of tensor parallelism, as Llama was published
_TORCH_FILES = (".pt", ".pth", ".ckpt", ".th", ".bin")
# The names of torch files whose library calls safetensors otherwise.
_SAFETENSORS_STEMS = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}


def weight_files_of(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The weight files of a directory and, from its index if there is one, tensor name → file.

    Shards that the index does not name are among the files.

    Raises:
        MpocError: there are no weights or several sets, a shard is missing, or the index names a file that is
            missing or lies outside the directory.
    """
    weights = _find_weights(path)
    check_inside(path, weights)
    if not _INDEX.search(weights.name):
        _all_shards(path, [weights])
        return [weights], None
    file_of = _read_index(path, weights)
    return _all_shards(path, sorted(set(file_of.values()))), file_of


def _find_weights(path: Path) -> Path:
    for pattern in _PATTERNS:
        matches = sorted(path.glob(pattern))
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = shortlist([file.name for file in matches])
            said = f"{len(matches)} weight files and no index that says which belong together ({names})"
            hint = "name one of the files instead of the directory"
            if all(_SHARD.match(file.name) for file in matches):
                hint = f"download their index too: {index_name(stem_of(matches))}"
            raise MpocError(f"{path}: {said}", hint)
    raise _no_weights(path)


def _all_shards(path: Path, files: list[Path]) -> list[Path]:
    """The files, and shards of the same set that are not among them.

    Raises:
        MpocError: the set lacks a shard that its file names count.
    """
    found = list(files)
    sets = {_shard_set(file): file for file in files if _SHARD.match(file.name)}
    for (stem, count, rest), file in sets.items():
        there = {_number(other): other for other in _shards(path) if _shard_set(other) == (stem, count, rest)}
        lost = next((number for number in range(1, count + 1) if number not in there), None)
        if lost is not None:
            said = f"{path}: shard {lost} of {count} is missing, beside {file.name}"
            raise MpocError(said, "download the whole directory again")
        found += [other for other in there.values() if other not in found]
    for file in found:
        check_inside(path, file)
    return sorted(found)


def _shards(path: Path) -> list[Path]:
    return [file for file in sorted(path.iterdir()) if _SHARD.match(file.name) and file.is_file()]


def _shard_set(file: Path) -> tuple[str, int, str]:
    """What the names of all shards of one set have in common: stem, number of shards, and ending."""
    match = _SHARD.match(file.name)
    assert match is not None
    return match["stem"], int(match["count"]), match["rest"]


def _number(file: Path) -> int:
    match = _SHARD.match(file.name)
    assert match is not None
    return int(match["number"])


def shard_notes(file: Path) -> list[str]:
    """A note on a file that is one shard of several; none for any other file."""
    parts = [other.name for other in file.parent.iterdir() if _PART.search(other.name)]
    if file.name in parts and len(parts) > 1:
        return [f"one of {len(parts)} parts of a model whose matrices are split across devices"]
    match = _SHARD.match(file.name)
    if match is None or int(match["count"]) == 1:
        return []
    which = f"{int(match['number'])} of {int(match['count'])}"
    return [f"shard {which} alone: the model's other tensors are not in it"]


def check_index(
    path: Path, held: Mapping[Path, Iterable[str]], wanted: Mapping[str, Path] | None
) -> dict[str, Path]:
    """Which file each tensor is taken from: the index's where it says so, else the one that holds it.

    Args:
        path: what the user named.
        held: the names of the tensors of each file.
        wanted: name → file as an index gives it; None where there is none.

    Raises:
        MpocError: the index names a tensor that its file lacks, or two files hold one that it does not name.
    """
    wanted = wanted or {}
    names = {file: set(tensors) for file, tensors in held.items()}
    for name, file in wanted.items():
        if name not in names[file]:
            raise MpocError(f"{path}: the index puts tensor {name!r} into {file.name}, which lacks it")
    owners = dict(wanted)
    for file, tensors in held.items():
        for name in tensors:
            other = owners.setdefault(name, file)
            if other != file and name not in wanted:
                raise MpocError(
                    f"{path}: tensor {name!r} is in {other.name} and in {file.name}, and in no index",
                    "remove it from one of them",
                )
    return owners


def index_notes(owners: Mapping[str, Path], wanted: Mapping[str, Path] | None) -> list[str]:
    """A note on tensors that the index omits; none where it names all."""
    lost = [name for name in owners if wanted is not None and name not in wanted]
    return [f"not in the index, kept: {shortlist(lost)}"] if lost else []


def shortlist(names: list[str], most: int = 4) -> str:
    """The first ``most`` names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stem_of(files: list[Path]) -> str:
    """What the library of these weight files calls its safetensors files, without number and ending.

    ``diffusion_pytorch_model.fp16-00001-of-00002.safetensors`` → ``diffusion_pytorch_model.fp16``.
    """
    name, match = files[0].name, _SHARD.match(files[0].name)
    if match:
        name = match["stem"] + match["rest"]
    stem = name.rpartition(".")[0]
    if name.endswith(".safetensors"):
        return stem
    base, dot, variant = stem.partition(".")
    return _SAFETENSORS_STEMS.get(base, base) + dot + variant


def index_name(stem: str) -> str:
    """``model.fp16`` → ``model.safetensors.index.fp16.json``: the index of shards with this stem."""
    base, dot, variant = stem.partition(".")
    return f"{base}.safetensors.index{dot}{variant}.json"


def index_metadata(path: Path) -> dict[str, Any]:
    """What an index says beside the size and the files of the tensors; {} in a directory without one."""
    weights = _find_weights(path)
    if not _INDEX.search(weights.name):
        return {}
    said = read_json(weights, parse_strictly).get("metadata")
    return (
        {key: value for key, value in said.items() if key != "total_size"} if isinstance(said, dict) else {}
    )


def _no_weights(path: Path) -> MpocError:
    """What a directory without weights holds, and which of its subfolders or files can be compressed."""
    if distributed := distributed_checkpoint(path):
        return distributed
    if len(parts := sorted(filter(_PART.search, (file.name for file in path.iterdir())))) > 1:
        said = f"{path}: {shortlist(parts)} are parts of one model, each matrix split across devices"
        return MpocError(said, "take the checkpoint in the format of transformers, or join the parts first")
    if shards := _shards(path):
        names = ", ".join(file.name for file in shards[:4])
        said = f"{path}: shards of weights without their index ({names})"
        return MpocError(said, "download the whole directory again")
    entries = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    said = f"{path}: no weights in this directory; it holds {_listed(entries)}"
    folders = [entry for entry in entries if entry.is_dir() and _holds_weights(entry)]
    candidates = folders or [
        *_torch_files(path),
        *(file for e in entries if e.is_dir() for file in _torch_files(e)),
    ]
    if candidates:
        chosen = max(candidates, key=_bytes_in)
        which = shortlist([str(candidate.relative_to(path)) for candidate in candidates])
        said += f"; can be compressed: {which}"
        return MpocError(said, command_line("mpoc", "compress", chosen, "--bond", 8))
    others = [entry for entry in entries if entry.is_file() and entry.suffix != ".json"]
    foreign = next((error for entry in others if (error := foreign_file(entry))), None)
    return MpocError(said, foreign.hint if foreign else f"looked for {', '.join(_PATTERNS[:2])}, …")


def _listed(entries: list[Path]) -> str:
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    return shortlist(names, 8) if names else "no file"


def _torch_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _TORCH_FILES]


def _holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _PATTERNS)


def _bytes_in(entry: Path) -> int:
    return output_bytes(entry) if entry.is_dir() else entry.stat().st_size


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
    held = {file: read_header(file).tensors for file in files}
    return {name: held[file][name] for name, file in check_index(path, held, file_of).items()}


def read_json(path: Path, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        MpocError: the file is too large, is not valid JSON, or holds no object.
    """
    try:
        value = parse(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise foreign_file(path) or MpocError(f"{path}: not valid JSON ({shortened(error)})") from error
    if not isinstance(value, dict):
        raise MpocError(f"{path}: not a JSON object")
    return value


def output_bytes(path: Path) -> int:
    """Size in bytes of a file, or of all files in a directory."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
