"""The working directory of a compression: fitted layers on disk, and what ``--resume`` continues from.

Layers are kept one file each until the output is assembled from them.  Memory then holds one layer's cores at
most, several processes can fit layers side by side, and finished work outlives the process.  The directory
lies beside the output: hidden and removed at the end, or ``OUT.partial``, which a later run with ``--resume``
continues from if its options are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import mpoc
from mpoc.compression.plain_fit import Fitted
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import Place, naming, scratch_beside
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.coded_parts import codes_from_file
from mpoc.io.keyed_store import digest, find_item, open_item, put_item
from mpoc.io.manifest import LayerRecord
from mpoc.io.manifest_reader import record_from_json, record_to_json
from mpoc.io.safetensors_writer import Entry
from mpoc.io.validation import parse_strictly
from mpoc.runtime.distributed import ProcessGroup
from mpoc.runtime.signals import defer_signals, removed_on_exit

_LAYERS, _CALIBRATION, _OUTPUT = "layers", "calibration", "output"
# Marks a resume directory; the process at work in it holds a lock on this file.
_MARK = "mpoc-partial.json"


@dataclass(frozen=True)
class CachedLayer:
    """A finished layer: its record, and the tensors that replace those of the source."""

    record: LayerRecord
    entries: dict[str, list[Entry]]
    seconds: float  # time of its fit
    losses: dict[str, list[float]]  # as of :class:`mpoc.compression.plain_fit.Fitted`


class LayerCache:
    """Fitted layers in a folder, one item of the keyed store each, and the tensors that belong to no layer.

    Args:
        folder: exists.
        keys: maps a layer's number to a key that says of which weight and by what means it is made; None:
            nothing is used again, and nothing is flushed to disk.
    """

    def __init__(self, folder: Path, keys: Callable[[int], str] | None = None) -> None:
        self._folder = folder
        self._keys = keys

    def keep(self, number: int, fitted: Fitted, seconds: float = 0.0) -> None:
        """Write a layer whose fit took so many seconds.

        Raises:
            OSError: writing failed (a full disk).
        """
        changed = {name: tensor for name, tensor in fitted.changed.items() if name != fitted.record.name}
        record = {
            "record": record_to_json(fitted.record),
            "changed": sorted(changed),
            "seconds": seconds,
            "losses": dict(fitted.losses),
        }
        entries = [*fitted.entries, *(Entry.of(*item) for item in changed.items())]
        self._write(self._path(number), record, entries, self._fingerprint(number))

    def count(self) -> int:
        """The number of finished layers."""
        return sum(1 for _ in self._folder.glob("[0-9]*.safetensors"))

    def clear(self, total: int) -> None:
        """Remove all but the first ``total`` layers: others, and what a killed process left half-written."""
        for path in self._folder.iterdir():
            if not path.stem.isdigit() or int(path.stem) >= total:
                _clear(path)

    def takes_up(self, number: int) -> bool:
        """Whether a layer is here, whole and made by the same means of the same weight; else remove it."""
        path = self._path(number)
        usable = self._keys is not None and find_item(path, self._fingerprint(number)) is not None
        if not usable:
            path.unlink(missing_ok=True)
        return usable

    def layer(self, number: int) -> CachedLayer:
        """A layer that was kept; its entries read from disk."""
        item = open_item(self._path(number))
        kept = item.record
        record = record_from_json(kept["record"])
        entries = {name: [item.entry(name)] for name in kept["changed"]}
        if record.is_changed:
            entries[record.name] = [item.entry(name) for name in record.file_names]
        return CachedLayer(record, entries, kept["seconds"], kept["losses"])

    def fitted(self, number: int) -> Fitted:
        """The same in memory, as it was fitted."""
        layer = self.layer(number)
        read = {entry.info.name: entry.read() for entries in layer.entries.values() for entry in entries}
        losses = {name: (before, after) for name, (before, after) in layer.losses.items()}
        record, changed = layer.record, {name: read[name] for name in layer.entries if name in read}
        if not record.storage:
            return Fitted(record, [read[name] for name in record.core_names], changed, losses)
        codes = [codes_from_file(part, read) for part in record.coded_parts]
        return replace(Fitted.rounded(record, codes, changed), losses=losses)

    def keep_others(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong to no single layer."""
        self._write(self._others, None, [Entry.of(*item) for item in tensors.items()], {})

    def others(self) -> dict[str, list[Entry]]:
        """These tensors, by the name of the source's tensor that each replaces."""
        item = open_item(self._others)
        return {name: [item.entry(name)] for name in item.tensors.infos}

    @property
    def _others(self) -> Path:
        return self._folder / "others.safetensors"

    def _write(self, path: Path, record: Any, entries: list[Entry], fingerprint: Mapping[str, str]) -> None:
        put_item(path, record, fingerprint, entries, durable=self._keys is not None, announced=False)

    def _fingerprint(self, number: int) -> dict[str, str]:
        return {} if self._keys is None else {"key": self._keys(number)}

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"


def layer_key(checkpoint: Checkpoint, plan: LayerPlan, recipe: Recipe, device: torch.device) -> str:
    """A digest of what a layer's cores depend on: versions, plan, seed, device, threads, weight."""
    versions = [mpoc.__version__, torch.__version__, device.type, torch.get_num_threads()]
    options = [recipe.seed, recipe.allow_growth, repr(plan)]
    return _sha256(versions, options, digest([(plan.map.name, checkpoint.read(plan.map.name))]))


def in_order_key(
    fingerprint: Mapping[str, str],
    checkpoint: Checkpoint,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    number: int | None = None,
) -> str:
    """A digest of what the cores of a layer depend on that is fitted after others (a sequential fit).

    Args:
        fingerprint: fingerprint of the network, the data, the software and the machine.
        checkpoint: the checkpoint that is compressed.
        plans: plans of all layers.
        recipe: recipe of the compression.
        number: number of the layer, whose weight need not be in the network; None: the shared part.
    """
    name = None if number is None else plans[number].map.name
    weight = "" if name is None else digest([(name, checkpoint.read(name))])
    source = checkpoint.fingerprint()
    return _sha256(sorted(fingerprint.items()), source, repr(recipe), repr(plans), number, weight)


def _sha256(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def existing_resume_directory(output: Path) -> Path:
    """``OUT.partial``, where ``--resume`` keeps its work."""
    return output.resolve().parent / f"{output.name}.partial"


@contextmanager
def resume_directory(
    output: Path, group: ProcessGroup, asked: Mapping[str, str] | None = None, start_over: bool = False
) -> Iterator[Path]:
    """A path for all processes to write to; on success it takes the place of ``output``.

    Beside it are directories for finished layers and for results of calibration.  On a failure, Ctrl-C
    included, nothing is left behind and an older ``output`` stays; with ``asked`` these directories stay in
    ``OUT.partial``.

    Args:
        output: file or directory.
        group: the processes.
        asked: the options of the work, which must be the same to resume; None: nothing is kept.
        start_over: remove the files of other work.

    Raises:
        UsageError: ``OUT.partial`` is not a resume directory, or of other work.
        MpocError: another process is at work in it.
    """
    place = Place(output)
    with ExitStack() as held, naming(output):
        folder = group.on_main(lambda: _prepared(output, held, asked, start_over))
        if asked is None:
            held.callback(_remove, folder)  # whoever is last: others may write to it still
        try:
            with removed_on_exit(folder if asked is None else None, place.state):
                yield folder / _OUTPUT / output.name
            with group.all_or_raise():
                if group.is_main:
                    place.take(folder / _OUTPUT / output.name, folder)
        except BaseException as error:
            place.tell(error)
            if asked is not None and not place.is_taken:
                _tell_kept(error, folder)
            raise


def _tell_kept(error: BaseException, folder: Path) -> None:
    """Note that finished work is kept; a directory without any is removed."""
    if any(_files(folder)):
        error.add_note(f"finished layers are in {folder.name}; --resume reuses them")
    else:
        _remove(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (file for name in (_LAYERS, _CALIBRATION) for file in (folder / name).glob("[!.]*"))


def _prepared(output: Path, held: ExitStack, asked: Mapping[str, str] | None, start_over: bool) -> Path:
    """The directory with its subdirectories; ``held`` removes it unless it is to be kept."""
    with defer_signals():
        folder = scratch_beside(output) if asked is None else _kept(output, held, asked, start_over)
        if asked is None:
            held.callback(_remove, folder)
        for name in (_LAYERS, _CALIBRATION, _OUTPUT):
            (folder / name).mkdir(exist_ok=True)
    return folder


def _remove(folder: Path) -> None:
    with defer_signals():
        shutil.rmtree(folder, ignore_errors=True)


def layers_folder(target: Path) -> Path:
    """The directory of finished layers that belongs to a path from :func:`resume_directory`."""
    return target.parent.parent / _LAYERS


def calibration_folder(target: Path) -> Path:
    """The directory for the results of calibration that belongs to such a path."""
    return target.parent.parent / _CALIBRATION


def _kept(output: Path, held: ExitStack, asked: Mapping[str, str], start_over: bool) -> Path:
    """The directory of an earlier run without unfinished files, or a new one; ``held`` keeps it locked."""
    folder = existing_resume_directory(output)
    if os.path.lexists(folder) and not (folder / _MARK).is_file() and not _is_empty(folder):
        raise UsageError(
            f"{folder}: exists, and is not a resume directory", "remove it, or choose another -o"
        )
    folder.mkdir(exist_ok=True)
    mark = held.enter_context((folder / _MARK).open("a+", encoding="utf-8"))
    _lock(mark, folder)
    other = _other(mark, asked)
    if other is not None and not start_over:
        hint = "run the same command as before to resume it; --force starts over"
        raise UsageError(f"{folder}: holds the layers of other work: {other}", hint)
    stays = (_MARK, _LAYERS, _CALIBRATION) if other is None else (_MARK,)
    for entry in folder.iterdir():
        if entry.name not in stays:
            _clear(entry)
    mark.truncate(0)
    json.dump(dict(asked), mark)
    mark.flush()
    for entry in (folder / _CALIBRATION).glob(".*"):  # files that were not written to their end
        _clear(entry)
    return folder


def _other(mark: TextIO, asked: Mapping[str, str]) -> str | None:
    """The options in which the kept work differs; None if there are none, or they are not known."""
    mark.seek(0)
    try:
        values: Any = parse_strictly(mark.read())
        before = {key: values[key] for key in asked}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    changed = [f"{key} was {before[key]} and is {asked[key]}" for key in asked if before[key] != asked[key]]
    return ", ".join(changed) or None


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _lock(mark: TextIO, folder: Path) -> None:
    """Lock the directory as long as ``mark`` is open; without effect on systems without such locks.

    Raises:
        MpocError: another has the lock, or had it and has just taken the folder away.
    """
    try:
        import fcntl

        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = os.fstat(mark.fileno()).st_nlink > 0
    except ImportError:
        return
    except BlockingIOError:
        still_there = False
    if not still_there:
        hint = "wait for it, or choose another -o"
        raise MpocError(f"{folder}: another mpoc is at work in it", hint)
