"""Dense weights back under their original names, shapes and dtypes, so that anything can load them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mpoc import hub_directory
from mpoc.checkpoint.base import Checkpoint, fingerprint
from mpoc.checkpoint.directory import weight_files_of
from mpoc.checkpoint.safetensors_file import open_safetensors
from mpoc.errors import MpocError
from mpoc.forms.layout import working_dtype
from mpoc.forms.mpo import MPO
from mpoc.header import TensorInfo
from mpoc.manifest import LayerRecord, Manifest, read_manifest
from mpoc.writer import Entry, plan_shards, refuse_existing, refuse_misnamed, staged, write_safetensors


def default_dense_output(source: Path) -> Path:
    """``m.mpo.safetensors`` → ``m.dense.safetensors``, ``bert-mpo/`` → ``bert-dense``."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    if source.is_dir():
        return Path(source.name.removesuffix("-mpo") + "-dense")
    return Path(source.name.removesuffix(".safetensors").removesuffix(".mpo") + ".dense.safetensors")


def expand_checkpoint(
    source: Path, output: Path, force: bool = False, max_shard_size: int = 5 * 10**9
) -> Manifest:
    """Write the dense checkpoint of a compressed one, a layer at a time.

    Raises:
        MpocError: not compressed by mpoc, damaged, or its tensors do not fit its manifest.
        UsageError: the output exists and ``force`` is not given.
    """
    manifest = read_manifest(source)
    refuse_existing(output, source, force)
    refuse_misnamed(output, source)
    stored = open_compressed(source)
    entries = _dense_entries(stored, manifest)
    with staged(output) as target:
        if not source.is_dir():
            write_safetensors(target, entries, {"format": "pt"})
        else:
            target.mkdir()
            hub_directory.copy_other_files(source, target, stored.weight_files)
            hub_directory.write_shards(target, plan_shards(entries, max_shard_size))
            hub_directory.unmark(target)
    return manifest


def open_compressed(path: Path) -> Checkpoint:
    """The tensors of a compressed file or directory, cores under their own names."""
    if not path.is_dir():
        return open_safetensors(path, [path], None, strip=False)
    files, wanted = weight_files_of(path)
    return open_safetensors(path, files, wanted, strip=False)


def check_cores(stored: Checkpoint, layer: LayerRecord) -> None:
    """Compare names, shapes and dtypes of a replaced layer's cores with the manifest.

    Raises:
        MpocError: a core is missing or differs.
    """
    for site in range(len(layer.output_factors)):
        name = layer.core_name(site)
        expected = (
            layer.bonds[site],
            layer.output_factors[site],
            layer.input_factors[site],
            layer.bonds[site + 1],
        )
        found = stored.infos.get(name)
        if found is None or found.shape != expected or found.dtype != layer.stored_dtype:
            said = f"{found.shape} {found.dtype}" if found else "missing"
            raise MpocError(
                f"{stored.path}: core {name!r} is {said}; the manifest says {expected} {layer.stored_dtype}"
            )


def dense_weight(stored: Checkpoint, layer: LayerRecord) -> Tensor:
    """The weight of a replaced layer in its original shape and dtype."""
    dtype = getattr(torch, layer.dtype)
    sites = range(len(layer.output_factors))
    cores = [stored.read(layer.core_name(k)).to(working_dtype(dtype)) for k in sites]
    return MPO(cores, layer.structure).to_weight().to(dtype)


def _dense_entries(stored: Checkpoint, manifest: Manifest) -> list[Entry]:
    """Every tensor of the original checkpoint, in order; tied ones under each of their names."""
    replaced = {layer.core_name(0): layer for layer in manifest.replaced}
    cores = {layer.core_name(k) for layer in manifest.replaced for k in range(len(layer.output_factors))}
    for layer in manifest.replaced:
        check_cores(stored, layer)
    entries: dict[str, Entry] = {}
    for name, info in stored.infos.items():
        if name in replaced:
            layer = replaced[name]
            dense = TensorInfo(layer.name, layer.dtype, layer.shape)
            entries[layer.name] = Entry(dense, lambda layer=layer: dense_weight(stored, layer))  # type: ignore[misc]
        elif name not in cores:
            entries[name] = Entry(info, lambda name=name: stored.read(name))  # type: ignore[misc]
    if fingerprint(entry.info for entry in entries.values()) != manifest.source.fingerprint:
        raise MpocError(
            f"{stored.path}: its tensors are not those of {manifest.source.name}: some are lost or changed",
            f"compress {manifest.source.name} again",
        )
    for alias, name in manifest.tied.items():
        if name not in entries:
            raise MpocError(f"{stored.path}: tensor {name!r} is missing")
        first = entries[name]
        entries[alias] = Entry(TensorInfo(alias, first.info.dtype, first.info.shape), first.read)
    return list(entries.values())
