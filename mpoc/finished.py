"""Fitted layers on disk, a file each, until the output is assembled from them.

Memory then holds one layer's cores at most, several processes can fit layers side by side, and what is
finished outlives the process.  A file appears whole or not at all: it is written beside its place, flushed,
and renamed.  What is there after a kill is used again where it was made by the same means of the same weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mpoc
from mpoc.checkpoint.base import Checkpoint
from mpoc.checkpoint.safetensors_file import open_safetensors
from mpoc.digest import digest
from mpoc.errors import MpocError
from mpoc.fitting import Fitted
from mpoc.header import read_header
from mpoc.manifest import LayerRecord, record_to_json
from mpoc.manifest_file import record_from_json
from mpoc.plan import LayerPlan
from mpoc.recipe import Recipe
from mpoc.writer import Entry, write_safetensors


@dataclass(frozen=True)
class Layer:
    """A finished layer: its record, and what stands in the place of the source's tensors that it changes."""

    record: LayerRecord
    entries: dict[str, list[Entry]]
    seconds: float  # that its fit took
    losses: dict[str, list[float]]  # as of :class:`mpoc.fitting.Fitted`


class Finished:
    """The files of a folder.

    Args:
        folder: exists.
        keys: of a layer's number says of what and by what means it is made; None: nothing is used again, and
            nothing is flushed to disk.
    """

    def __init__(self, folder: Path, keys: Callable[[int], str] | None = None) -> None:
        self._folder = folder
        self._keys = keys

    def keep(self, number: int, fitted: Fitted, seconds: float = 0.0) -> None:
        """Write a layer that took so many seconds.

        Raises:
            OSError: of writing (a full disk).
        """
        tensors = dict(zip(fitted.record.core_names, fitted.cores, strict=True)) if fitted.cores else {}
        facts = {"record": record_to_json(fitted.record), "changed": json.dumps(sorted(fitted.changed))}
        facts |= {"seconds": repr(seconds), "losses": json.dumps(dict(fitted.losses))}
        if self._keys is not None:
            facts["key"] = self._keys(number)
            facts["digest"] = _digest({**tensors, **fitted.changed}, facts)
        self._write(self._path(number), {**tensors, **fitted.changed}, facts)

    def count(self) -> int:
        """How many layers are finished."""
        return sum(1 for _ in self._folder.glob("[0-9]*.safetensors"))

    def clear(self, total: int) -> None:
        """Remove what is no layer of ``total``, and what was not written to its end."""
        for path in self._folder.iterdir():
            if path.suffix == ".writing" or not path.stem.isdigit() or int(path.stem) >= total:
                path.unlink()

    def takes_up(self, number: int) -> bool:
        """Whether a layer is here, made by the same means of the same weight; any other is removed."""
        found = self._is_usable(number)
        if not found:
            self._path(number).unlink(missing_ok=True)
        return found

    def _is_usable(self, number: int) -> bool:
        """Nor may it be damaged."""
        path = self._path(number)
        if self._keys is None or not path.is_file():
            return False
        try:
            facts = read_header(path).metadata
            stored = open_safetensors(path, [path], None, strip=False)
            tensors = {name: stored.read(name) for name in stored.infos}
        except MpocError:
            return False
        found = facts.pop("digest", None)
        return facts.get("key") == self._keys(number) and found == _digest(tensors, facts)

    def layer(self, number: int) -> Layer:
        """A layer that was kept; its entries read from disk."""
        path = self._path(number)
        facts = read_header(path).metadata
        stored = open_safetensors(path, [path], None, strip=False)
        record = record_from_json(facts["record"])
        entries = {name: [_entry(stored, name)] for name in json.loads(facts["changed"])}
        cores = [_entry(stored, name) for name in stored.infos if name not in entries]
        if cores:
            entries[record.name] = sorted(cores, key=lambda entry: record.core_names.index(entry.info.name))
        return Layer(record, entries, float(facts["seconds"]), json.loads(facts["losses"]))

    def fitted(self, number: int) -> Fitted:
        """The same in memory, as it was fitted."""
        layer = self.layer(number)
        read = {name: [entry.read() for entry in entries] for name, entries in layer.entries.items()}
        cores = read.pop(layer.record.name, [])
        losses = {name: (before, after) for name, (before, after) in layer.losses.items()}
        return Fitted(layer.record, cores, {name: tensor for name, (tensor,) in read.items()}, losses)

    def keep_others(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors that belong to no single layer."""
        self._write(self._others, tensors, {})

    def others(self) -> dict[str, list[Entry]]:
        """Those, in the place of the source's of the same names."""
        stored = open_safetensors(self._others, [self._others], None, strip=False)
        return {name: [_entry(stored, name)] for name in stored.infos}

    @property
    def _others(self) -> Path:
        return self._folder / "others.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str]) -> None:
        beside = path.with_suffix(".writing")
        entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
        write_safetensors(beside, entries, facts, durable=self._keys is not None)
        beside.replace(path)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"


def _entry(stored: Checkpoint, name: str) -> Entry:
    return Entry(stored.infos[name], partial(stored.read, name))


def layer_key(checkpoint: Checkpoint, plan: LayerPlan, recipe: Recipe, device: torch.device) -> str:
    """Says what a layer's cores depend on: versions, plan, seed, device, threads, and the weight's bytes."""
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
    """Says what a layer's cores depend on that is fitted behind others.

    Args:
        fingerprint: of the network, the data, the software and the machine.
        checkpoint: that is compressed.
        plans: of all layers.
        recipe: of the compression.
        number: of the layer, whose weight need not be in the network; None: of what the layers share.
    """
    name = None if number is None else plans[number].map.name
    weight = "" if name is None else digest([(name, checkpoint.read(name))])
    source = checkpoint.fingerprint()
    return _sha256(sorted(fingerprint.items()), source, repr(recipe), repr(plans), number, weight)


def _sha256(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """Of the file of a layer."""
    return digest(tensors.items(), json.dumps(sorted(facts.items())))
