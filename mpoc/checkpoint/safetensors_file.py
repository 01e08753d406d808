"""One or several safetensors files, read a tensor at a time."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpoc.checkpoint.base import Checkpoint, strip_wrappers
from mpoc.errors import MpocError
from mpoc.header import TensorInfo, read_header


def open_safetensors(
    path: Path, files: list[Path], wanted: dict[str, Path] | None, strip: bool = True
) -> Checkpoint:
    """A checkpoint over ``files``.

    Args:
        path: what the user named.
        files: the safetensors files.
        wanted: name → file as an index gives it; None where the one file is the index.
        strip: take wrapper prefixes off the names.

    Raises:
        MpocError: a file is broken, or the index names a tensor that its file lacks.
    """
    held = {file: read_header(file).tensors for file in files}
    if wanted is None:
        wanted = {name: file for file in files for name in held[file]}
    for name, file in wanted.items():
        if name not in held[file]:
            raise MpocError(f"{path}: the index puts tensor {name!r} into {file.name}, which lacks it")
    clean = strip_wrappers(list(wanted)) if strip else {name: name for name in wanted}
    origin = {short: (name, wanted[name]) for name, short in clean.items()}

    def read(name: str) -> Tensor:
        original, file = origin[name]
        try:
            # Opened anew for every tensor: the mapping, and the pages it holds, go with the tensor.
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(original)
        except SafetensorError as error:
            raise MpocError(f"{file}: tensor {original!r} cannot be read: {error}") from error

    infos = {}
    for short, (name, file) in origin.items():
        info = held[file][name]
        infos[short] = TensorInfo(short, info.dtype, info.shape)
    return Checkpoint(path, infos, {}, read, {short: file for short, (_, file) in origin.items()})
