"""A trained network as a file like the one it came from: same names, same stored dtypes, honest figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc import hub_directory
from mpoc.errors import MpocError
from mpoc.forms.layout import working_dtype
from mpoc.forms.terms import form_of
from mpoc.header import ITEMSIZE, TensorInfo
from mpoc.history import metadata, write_history
from mpoc.manifest import LayerRecord, Manifest
from mpoc.train.model import Model
from mpoc.train.watch import short
from mpoc.writer import Entry, plan_shards, staged, write_safetensors


def default_tuned_output(source: Path) -> Path:
    """``m.mpo.safetensors`` or ``m.pt`` → ``m.tuned.safetensors``, ``bert-mpo/`` → ``bert-tuned``."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    if source.is_dir():
        return Path(source.name.removesuffix("-mpo") + "-tuned")
    return Path(source.stem.removesuffix(".mpo") + ".tuned.safetensors")


def write_tuned(
    model: Model, weights: dict[str, Tensor], training: dict[str, Any], output: Path, max_shard_size: int
) -> Manifest | None:
    """Write ``weights`` in the place of those of ``model``'s file.

    Args:
        model: that was trained.
        weights: by the network's names.
        training: what the file keeps of it, before what it says of trainings before.
        output: a file, or a directory where the model's is one; appears whole or not at all.
        max_shard_size: in bytes; directories only.

    Returns:
        The manifest; None for a dense model.
    """
    entries = tuned_entries(model, weights)
    history = {**training, **({"earlier": model.history} if model.history else {})}
    manifest = None if model.manifest is None else tuned_manifest(model.manifest, entries, history)
    with staged(output) as target:
        if not model.stored.is_directory:
            compressed = manifest and {"format": "pt", "mpoc": manifest.to_json()}
            write_safetensors(target, entries, compressed or metadata(history))
            return manifest
        target.mkdir()
        hub_directory.copy_other_files(model.path, target, model.stored.weight_files)
        hub_directory.write_shards(target, plan_shards(entries, max_shard_size))
        if manifest is not None:
            hub_directory.unmark(target)  # of the model card: what was said of the cores before
            hub_directory.mark_compressed(target, manifest)
        else:
            write_history(target, history)
    return manifest


@torch.no_grad()
def round_to_stored(model: Model) -> bool:
    """Give the network the values that its file can hold; whether any of its tensors is stored narrower."""
    tensors = {**dict(model.network.named_parameters()), **dict(model.network.named_buffers())}
    narrowed = False
    for name, place in model.places.items():
        info, tensor = model.stored.infos.get(name), tensors.get(place)
        if info is not None and tensor is not None and ITEMSIZE[info.dtype] < tensor.dtype.itemsize:
            tensor.copy_(tensor.to(getattr(torch, info.dtype)))
            narrowed = True
    return narrowed


def tuned_entries(model: Model, weights: dict[str, Tensor]) -> list[Entry]:
    """Every tensor of the file, in order; those of the network as trained, in their stored dtypes."""
    stored = model.stored
    infos = list(stored.infos.values())
    if model.manifest is None:
        infos += [replace(stored.infos[first], name=alias) for alias, first in stored.tied.items()]
    trained = {place for place, _ in model.network.named_parameters(remove_duplicate=False)}
    return [_entry(model, info, weights, trained) for info in infos]


def _entry(model: Model, info: TensorInfo, weights: dict[str, Tensor], trained: set[str]) -> Entry:
    place = model.places.get(info.name)
    if place is None or place not in weights:
        source = model.stored.tied.get(info.name, info.name)
        return Entry(info, lambda: model.stored.read(source))

    def read() -> Tensor:
        found = weights[place].detach().to("cpu", getattr(torch, info.dtype))
        if place in trained and not bool(torch.isfinite(found).all()):
            said = f"{model.path}: tensor {info.name!r} is not finite any more after the training"
            raise MpocError(said, "a smaller --lr")
        return found

    return Entry(info, read)


def tuned_manifest(manifest: Manifest, entries: list[Entry], history: dict[str, Any]) -> Manifest:
    """The manifest with this history; errors against the original weights are known no more."""
    tensors = {entry.info.name: entry for entry in entries}
    layers = tuple(
        layer if layer.form == "dense" else _tuned_record(layer, tensors) for layer in manifest.layers
    )
    return replace(manifest, layers=layers, training=history)


def _tuned_record(layer: LayerRecord, tensors: dict[str, Entry]) -> LayerRecord:
    if layer.low_rank:
        return replace(layer, relative_error=None)
    dtype = working_dtype(getattr(torch, layer.dtype))
    cores = [tensors[name].read().to(dtype) for name in layer.core_names]
    entropies = tuple(map(short, form_of(cores, layer.structure).entropies()))
    return replace(layer, relative_error=None, entropies=entropies)
