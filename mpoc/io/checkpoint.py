"""A checkpoint, independent of its file format, and its implementation for safetensors files.

Names, shapes and dtypes are known once it is open. Values are read one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.safetensors_header import TensorInfo, count_parameters, read_header
from mpoc.io.training_history import Measured
from mpoc.io.weight_files import check_index, index_notes, stem_of


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
    metadata: dict[str, str] = field(default_factory=dict)  # of the headers of its safetensors files
    measured: Measured = field(
        default_factory=Measured
    )  # scores that its output will record, at their longest
    wrapped: dict[str, str] = field(default_factory=dict)  # name → that in the file, where wrappers are in it

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU; memory-mapped where the format allows, so do not write to it."""
        return self.reader(name)

    def in_names_of_file(self) -> Checkpoint:
        """The same checkpoint with what wrappers put into names, or seem to have put there."""
        own = {name: self.wrapped.get(name, name) for name in (*self.infos, *self.tied)}
        back = {theirs: name for name, theirs in own.items()}
        return replace(
            self,
            infos={own[name]: replace(info, name=own[name]) for name, info in self.infos.items()},
            tied={own[alias]: own[first] for alias, first in self.tied.items()},
            reader=lambda name: self.reader(back[name]),
            files={own[name]: file for name, file in self.files.items()},
            wrapped={},
        )

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
    def stem(self) -> str:
        """What the library of the weight files calls its safetensors files, as ``model``."""
        return stem_of(self.weight_files)

    @property
    def own_metadata(self) -> dict[str, str]:
        """The metadata of a header for these tensors, without what mpoc puts there."""
        kept = {key: text for key, text in self.metadata.items() if not key.startswith("mpoc")}
        return {"format": "pt"} | kept

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


# What wrappers put into names: torch.compile, FSDP, activation checkpointing, Lightning's strategies.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_BESIDE_WRAPPED = ("n_averaged",)  # AveragedModel's own, beside module.*


def strip_wrappers(names: list[str]) -> dict[str, str]:
    """Map names to names without what wrappers put into them.

    ``module`` (DDP, DataParallel, AveragedModel) is removed where all names begin with it, or all names below
    one first part go on with it.  Nothing is removed if two names would become equal.
    """
    clean = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    while wrapped := _wrapped_in_module([name for name in clean.values() if name not in _BESIDE_WRAPPED]):
        clean = {name: _without_module(short, wrapped) for name, short in clean.items()}
    return clean if len(set(clean.values())) == len(clean) and all(clean.values()) else {n: n for n in names}


def changed_names(clean: Mapping[str, str]) -> dict[str, str]:
    """Name → name in the file, of the names that :func:`strip_wrappers` changed."""
    return {short: name for name, short in clean.items() if short != name}


def wrapper_notes(clean: Mapping[str, str]) -> list[str]:
    """A note on a wrapper below another part of names, which is told from the names alone."""
    for name, short in clean.items():
        if name != short and not name.endswith(short):
            return [f"names without what wrappers put into them: {name} is {short}"]
    return []


def _wrapped_in_module(names: list[str]) -> set[str]:
    """The first parts below which every name goes on with ``module``; {""} where all names begin with it."""
    if names and all(name.startswith("module.") for name in names):
        return {""}
    below: dict[str, set[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        below.setdefault(f"{first}.", set()).add(rest.partition(".")[0] if "." in rest else "")
    return {first for first, seconds in below.items() if seconds == {"module"}}


def _without_module(name: str, wrapped: set[str]) -> str:
    for prefix in wrapped:
        if name.startswith(f"{prefix}module."):
            return prefix + name.removeprefix(f"{prefix}module.")
    return name


class _MappedFile:
    """A safetensors file whose header is read once; its tensors are mapped into memory one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._look()
        self.header = read_header(path)

    def _look(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, name: str) -> Tensor:
        """A tensor; the mapping and its pages are released with it.

        Raises:
            MpocError: the file is no longer that whose header was read.
        """
        info, start = self.header.tensors[name], self.header.starts[name]
        dtype = getattr(torch, info.dtype)
        if self._look() != self._state:
            raise MpocError(f"{self._path}: changed while it was read (tensor {name!r})", "start again")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        storage = torch.UntypedStorage.from_file(str(self._path), False, self._state[1])
        raw = torch.empty(0, dtype=torch.uint8).set_(storage[start : start + info.nbytes])
        return (raw.clone() if start % dtype.itemsize else raw).view(dtype).view(info.shape)


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
    opened = {file: _MappedFile(file) for file in files}
    held = {file: mapped.header.tensors for file, mapped in opened.items()}
    owners = check_index(path, held, wanted)
    clean = strip_wrappers(list(owners)) if strip else {name: name for name in owners}
    origin = {short: (name, owners[name]) for name, short in clean.items()}
    infos = {short: replace(held[file][name], name=short) for short, (name, file) in origin.items()}

    def read(short: str) -> Tensor:
        name, file = origin[short]
        return opened[file].read(name)

    return Checkpoint(
        path,
        infos,
        {},
        read,
        {short: file for short, (_, file) in origin.items()},
        notes=wrapper_notes(clean) + index_notes(owners, wanted),
        wrapped=changed_names(clean),
        metadata=shared_metadata(mapped.header.metadata for mapped in opened.values()),
    )


def shared_metadata(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of several files: every key, with the value of the first file that has it."""
    merged: dict[str, str] = {}
    for part in parts:
        merged = dict(part) | merged
    return merged
