"""A checkpoint, independent of its file format, and its implementation for safetensors files.

Names, shapes and dtypes are known once it is open. Values are read one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.safetensors_header import TensorInfo, count_parameters, read_header


@dataclass
class Checkpoint:
    """Names, shapes and dtypes; data only through :meth:`read`.

    Wrapper prefixes are already stripped from the names.
    """

    path: Path  # the file or directory, as the user named it
    infos: dict[str, TensorInfo]  # each distinct tensor once
    tied: dict[str, str]  # name → the name in ``infos`` that holds its data
    reader: Callable[[str], Tensor]  # data of one tensor, by its name in ``infos``
    files: dict[str, Path]  # name → the file that holds it, for messages
    config: dict[str, Any] | None = None  # a Hugging Face directory's config.json
    notes: list[str] = field(default_factory=list)  # what the user should know about the reading
    kinds: dict[str, tuple[str | None, bool]] | None = None  # (kind, transposed) by modules; absent: by name
    left: dict[str, str] = field(default_factory=dict)  # left unchanged whatever is asked → the reason
    architecture: dict[str, str] = field(default_factory=dict)  # the network it belongs to, where named
    history: dict[str, Any] = field(default_factory=dict)  # of its training by mpoc; {}: none is recorded

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU; memory-mapped where the format allows, so do not write to it."""
        return self.reader(name)

    @property
    def is_directory(self) -> bool:
        """Whether this is a Hugging Face directory rather than one file."""
        return self.path.is_dir()

    @property
    def num_parameters(self) -> int:
        """Entries of all floating tensors, tied ones once, batch-norm statistics left out."""
        return count_parameters(self.infos.values())

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self.files.values()))

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    def fingerprint(self) -> str:
        """SHA-256 that identifies the checkpoint a compressed file came from."""
        return tensor_fingerprint(self.infos.values())


def tensor_fingerprint(infos: Iterable[TensorInfo]) -> str:
    """SHA-256 over the names, dtypes and shapes of tensors."""
    table = [[info.name, info.dtype, list(info.shape)] for info in sorted(infos, key=_name)]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def _name(info: TensorInfo) -> str:
    return info.name


def strip_wrappers(names: list[str]) -> dict[str, str]:
    """Map names to names without the prefixes of DDP (``module.``) and torch.compile (``_orig_mod.``).

    ``module.`` is removed only if every name has it, and nothing if two names would become equal.
    """
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean if len(set(clean.values())) == len(clean) else {name: name for name in names}


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
            # Opened for every tensor, so that the mapping and its pages are released with the tensor.
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(original)
        except SafetensorError as error:
            raise MpocError(f"{file}: tensor {original!r} cannot be read: {error}") from error

    infos = {}
    for short, (name, file) in origin.items():
        info = held[file][name]
        infos[short] = TensorInfo(short, info.dtype, info.shape)
    return Checkpoint(path, infos, {}, read, {short: file for short, (_, file) in origin.items()})
