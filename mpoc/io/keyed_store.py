"""Store intermediate results on disk, to be reused only if they are whole and of the same origin.

An item is one safetensors file: named tensors, and in the header's metadata a record of plain JSON data, the
fingerprint of all that the item depends on, part by part, and a digest over everything.  It appears whole or
not at all. Fitted layers, moments of calibration data, budget allocations, the networks of a study and the
checkpoints of a training are such items.  The digest finds damage, not forgery: code that uses an
item from elsewhere must check names, shapes and values.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.atomic import staged
from mpoc.io.checkpoint import Checkpoint, open_safetensors
from mpoc.io.safetensors_header import read_header
from mpoc.io.safetensors_writer import Entry, raw_bytes, write_safetensors
from mpoc.runtime.formatting import human_bytes
from mpoc.runtime.signals import defer_signals, removed_on_exit

_FORMAT = "mpoc.item/1"
_RECORD, _FINGERPRINT, _DIGEST = "record", "fingerprint", "digest"
_NUMBERS = itertools.count()  # of the files of all scratches: what is mapped into memory is never overwritten
_HELD_BYTES = 64 * 1024**2  # of a scratch's tensors in memory, where it has a folder
_LARGE = 16 * 1024**2  # bytes of tensors that go to a file at once
_SMALL = 1 << 20  # bytes of a tensor that is not worth a mapped file of its own
_STALE = 3600  # seconds after which a folder that is still nameless was left by a killed run


@dataclass(frozen=True)
class Item:
    """A stored result whose header has been read."""

    path: Path
    record: Any  # plain JSON data
    fingerprint: dict[str, str]  # what it depends on: part → digest
    tensors: Checkpoint  # read one at a time
    _facts: dict[str, str]

    def entry(self, name: str) -> Entry:
        """A tensor that is read when it is written elsewhere."""
        return Entry(self.tensors.infos[name], partial(self.tensors.read, name))

    def read_all(self) -> dict[str, Tensor]:
        """Read all tensors into memory of their own.

        Raises:
            MpocError: the item is damaged.
        """
        tensors = {name: self.tensors.read(name).clone() for name in self.tensors.infos}
        self._check(Entry.of(name, tensor) for name, tensor in tensors.items())
        return tensors

    def is_whole(self) -> bool:
        """Whether record, fingerprint and tensors are those that were written."""
        try:
            self._check(map(self.entry, self.tensors.infos))
        except MpocError:
            return False
        return True

    def _check(self, entries: Iterable[Entry]) -> None:
        if self._facts.get(_DIGEST) != _digest(entries, self._facts):
            raise damaged(self.path, "its contents are not those that were written")


def damaged(path: Path, reason: str) -> MpocError:
    """The error of an item that cannot be used."""
    return MpocError(f"{path}: damaged: {reason}", f"remove {path}; it is computed again")


def put_item(
    path: Path,
    record: Any,
    fingerprint: Mapping[str, str] | None = None,
    entries: Sequence[Entry] = (),
    *,
    durable: bool = True,
    announced: bool = True,
) -> None:
    """Write an item, in the place of an older one.

    Args:
        path: path of the file.
        record: plain JSON data.
        fingerprint: fingerprint of all that the item depends on, part → digest.
        entries: tensors; each is read twice.
        durable: flush the file to disk.
        announced: errors and signals name ``path``, as :func:`mpoc.io.atomic.staged` does.

    Raises:
        OSError: writing failed (a full disk).
    """
    depends_on = json.dumps(dict(fingerprint or {}))
    facts = {"format": _FORMAT, _RECORD: json.dumps(record), _FINGERPRINT: depends_on}
    facts[_DIGEST] = _digest(entries, facts)
    with staged(path, announced) as target:
        write_safetensors(target, list(entries), facts, durable)


def open_item(path: Path) -> Item:
    """Read an item's header.

    Raises:
        MpocError: the file is not an item, or its header is damaged.
        OSError: there is no such file.
    """
    facts = read_header(path).metadata
    if facts.get("format") != _FORMAT:
        hint = "remove it, or name another file"
        raise MpocError(f"{path}: holds no intermediate results of this mpoc", hint)
    try:
        record, fingerprint = json.loads(facts[_RECORD]), dict(json.loads(facts[_FINGERPRINT]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, "its header does not hold what was written") from error
    return Item(path, record, fingerprint, open_safetensors(path, [path], None, strip=False), facts)


def find_item(path: Path, fingerprint: Mapping[str, str]) -> Item | None:
    """The item at ``path`` where it is whole and has this fingerprint; else None.

    Raises:
        OSError: reading failed.
    """
    if not path.is_file():
        return None
    try:
        item = open_item(path)
    except MpocError:
        return None
    return item if item.fingerprint == dict(fingerprint) and item.is_whole() else None


def digest(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """BLAKE2 over ``text`` and over names, shapes, dtypes and values of tensors, in any order."""
    return _of_entries([Entry.of(name, tensor) for name, tensor in tensors], text)


def _digest(entries: Iterable[Entry], facts: Mapping[str, str]) -> str:
    return _of_entries(list(entries), json.dumps([facts["format"], facts[_RECORD], facts[_FINGERPRINT]]))


def _of_entries(entries: Sequence[Entry], text: str) -> str:
    """The digest, with one tensor in memory at a time."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for entry in sorted(entries, key=lambda entry: entry.info.name):
        tensor = entry.read()
        total.update(repr((entry.info.name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel():
            total.update(raw_bytes(tensor))
    return total.hexdigest()


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder of its own in ``parent``, removed at the end, and with it those that killed runs left there.

    Raises:
        MpocError: there is no such directory, or it cannot be written to.
        OSError: its disk is full, or knows no locks.
    """
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise MpocError(f"--scratch {parent}: not a directory that can be written to", f"mkdir -p {parent}")
    for old in parent.glob(".mpoc-scratch-*"):
        with suppress(OSError), (old / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held for as long as its process lives
            shutil.rmtree(old, ignore_errors=True)
    for old in parent.glob(".mpoc-new-*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                shutil.rmtree(old, ignore_errors=True)
    folder: Path | None = None
    opened = ExitStack()
    try:
        with defer_signals():
            folder = Path(tempfile.mkdtemp(prefix=".mpoc-new-", dir=parent))
            mark = opened.enter_context((folder / "lock").open("a"))
            fcntl.flock(mark, fcntl.LOCK_EX)
            # Only once it is locked does it have a name that other processes look for
            folder = folder.rename(folder.with_name(folder.name.replace("-new-", "-scratch-")))
        with removed_on_exit(folder):
            yield folder
    finally:
        with defer_signals():
            opened.close()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """Lists of tensors by key, in memory or in files; of one key only one thread knows at a time.

    Args:
        folder: for files; None: all are held in memory.
        limit: bytes that are held in memory where there is a folder, lists of more than 16 MB excepted.
        required: whether it is an error that the disk has no room; else half of what is free now is left to
            the output and to other programs, and memory holds the rest.
    """

    def __init__(
        self, folder: Path | None = None, limit: int | None = None, *, required: bool = True
    ) -> None:
        self._folder, self._limit = folder, _HELD_BYTES if limit is None else limit
        self.is_required = required and folder is not None  # the user wants memory spared
        self._left = 0 if required or folder is None else _free(folder) // 2
        self._lock = threading.RLock()  # threads may put and drop at the same time
        self._held: dict[Hashable, list[Tensor]] = {}
        self._files: dict[Hashable, tuple[Path, list[torch.device], int]] = {}  # with their bytes
        self.nbytes = 0  # in memory
        self._filed = self.most = 0  # in files; in both together, at the most
        self._spills = False  # whether memory holds what the disk had no room for

    @property
    def notes(self) -> list[str]:
        """A note if memory holds what files were to hold."""
        said = "beside the output there was no room for all files of the calibration, so memory held the rest"
        return [f"{said}; --scratch DIR names a folder on another disk"] if self._spills else []

    def has_room(self, nbytes: int) -> bool:
        """Whether there is room beyond memory for so many bytes."""
        if self._folder is None:
            return False
        return self.is_required or nbytes <= _free(self._folder) - self._left

    def put(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Keep tensors, in the place of those of the same key.

        Raises:
            MpocError: the disk has no room for them.
        """
        self.drop(key)
        nbytes = sum(map(_nbytes, tensors))
        held = nbytes <= _LARGE and self.nbytes + nbytes <= self._limit
        path = None if held else self._written(tensors, nbytes)
        with self._lock:
            if path is None:
                self._held[key] = list(tensors)
                self.nbytes += nbytes
            else:
                self._files[key] = path, [tensor.device for tensor in tensors], nbytes
                self._filed += nbytes
            self.most = max(self.most, self.nbytes + self._filed)

    def mapped(self, tensor: Tensor) -> Tensor:
        """The tensor, mapped into memory from a file that goes with it where there is a folder and no GPU.

        Raises:
            MpocError: the disk has no room for it.
        """
        nbytes = _nbytes(tensor)
        apart = tensor.device.type == "cpu" and nbytes > min(_SMALL, self._limit)
        if not apart or (path := self._written([tensor], nbytes)) is None:
            return tensor
        (found,) = load_file(path).values()
        path.unlink()
        return found

    def _written(self, tensors: Sequence[Tensor], nbytes: int) -> Path | None:
        """A file of tensors; None: memory is to hold them."""
        if self._folder is None:
            return None
        if not self.has_room(nbytes):
            self._spills = True
            return None
        full = MpocError(
            f"--scratch {self._folder.parent}: {human_bytes(nbytes)} more do not fit on its disk",
            "make room, or name a folder on another disk",
        )
        if nbytes > _free(self._folder):
            raise full
        path = self._folder / f"{os.getpid()}-{next(_NUMBERS)}.safetensors"
        try:
            save_file({str(k): tensor.detach().cpu().contiguous() for k, tensor in enumerate(tensors)}, path)
        except SafetensorError as error:  # of the disk, which other processes fill too
            path.unlink(missing_ok=True)
            if not self.is_required:
                self._spills = True
                return None
            raise full from error
        return path

    def get(self, key: Hashable) -> list[Tensor]:
        """The tensors of a key, on their devices.

        Raises:
            KeyError: there are none.
        """
        if key in self._held:
            return self._held[key]
        path, devices, _ = self._files[key]
        stored = load_file(path)
        return [stored[str(k)].to(device) for k, device in enumerate(devices)]

    def drop(self, key: Hashable) -> None:
        """Forget the tensors of a key, if there are any."""
        with self._lock:
            self.nbytes -= sum(map(_nbytes, self._held.pop(key, [])))
            if key in self._files:
                path, _, nbytes = self._files.pop(key)
                path.unlink()
                self._filed -= nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._files


def _free(folder: Path) -> int:
    """Bytes that its disk has room for."""
    return shutil.disk_usage(folder).free


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
