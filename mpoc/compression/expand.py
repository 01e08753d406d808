"""Expand a compressed checkpoint to dense weights under their original names, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.atomic import refuse_existing, refuse_misnamed, staged
from mpoc.io.checkpoint import Checkpoint, tensor_fingerprint
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import check_cores, open_compressed
from mpoc.io.safetensors_header import ITEMSIZE, TensorInfo
from mpoc.io.safetensors_writer import Entry, plan_shards, write_safetensors
from mpoc.io.training_history import metadata, write_history
from mpoc.runtime.device import require_disk_space, require_memory
from mpoc.tensor_networks.fit.conv_map import project
from mpoc.tensor_networks.fit.truncation import largest
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import working_dtype
from mpoc.tensor_networks.forms.mpo import MPO

# A map counts as a convolution if it is nearer to one than this many roundings of its cores.
_ROUNDING = 64


def default_dense_output(source: Path) -> Path:
    """``m.mpo.safetensors`` → ``m.dense.safetensors``, ``bert-mpo/`` → ``bert-dense``."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    if source.is_dir():
        return Path(source.name.removesuffix("-mpo") + "-dense")
    return Path(source.name.removesuffix(".safetensors").removesuffix(".mpo") + ".dense.safetensors")


def expand_checkpoint(
    source: str | PathLike[str],
    output: str | PathLike[str],
    force: bool = False,
    max_shard_size: int = 5 * 10**9,
    projected: Callable[[LayerRecord, float], None] | None = None,
) -> Manifest:
    """Write the dense checkpoint of a compressed one, layer by layer.

        >>> manifest = mpoc.expand_checkpoint("digits-cnn.mpo.safetensors", "digits-cnn.dense.safetensors")
        >>> network = DigitsNet()
        >>> network.load_state_dict(safetensors.torch.load_file("digits-cnn.dense.safetensors"))
        <All keys matched successfully>

    Every tensor gets its original name, shape and dtype, so that any program can load the output.

    Args:
        source: a compressed file or directory.
        output: a file or directory, like the source.
        force: replace an existing output.
        max_shard_size: largest weight file in bytes; directories only.
        projected: permits a whole map that is no longer a convolution to become the nearest one; called with
            each such layer and the relative error of its map.

    Returns:
        The manifest of the compressed checkpoint.

    Raises:
        MpocError: the source was not compressed by mpoc or is damaged, its tensors do not fit its manifest,
            or it holds a whole map that is not a convolution and ``projected`` is None.
        UsageError: the output exists and ``force`` is not given.
        OSError: reading or writing failed (a full disk).
    """
    source, output = Path(source), Path(output)
    manifest = read_manifest(source)
    refuse_existing(output, source, force)
    refuse_misnamed(output, source)
    stored = open_compressed(source, manifest)
    for layer in manifest.replaced:
        check_cores(stored, layer)
        _refuse_too_large(source, layer)
    entries = _dense_entries(stored, manifest)
    require_disk_space(output, sum(entry.info.nbytes for entry in entries))
    _check_maps(stored, manifest, projected)
    with staged(output) as target:
        if source.is_dir():
            _write_directory(target, stored, entries, max_shard_size)
            write_history(target, manifest.training)
        else:
            write_safetensors(target, entries, stored.own_metadata | metadata(manifest.training))
    return manifest


def _write_directory(target: Path, stored: Checkpoint, entries: list[Entry], max_shard_size: int) -> None:
    """Write the shards of a dense directory, and all files of the source that hold no weights."""
    target.mkdir()
    hub_directory.copy_other_files(stored.path, target, stored.weight_files)
    hub_directory.write_shards(target, plan_shards(entries, max_shard_size, stored.stem), stored)
    hub_directory.unmark(target)


def dense_weight(stored: Checkpoint, layer: LayerRecord) -> Tensor:
    """The weight of a replaced layer in its original shape and dtype; of a whole map the nearest kernel."""
    cores = _cores(stored, layer)
    if layer.geometry is None:
        weight = form_of(cores, layer.structure).to_weight()
    else:
        weight = project(MPO(cores, layer.structure))[0]
    stored_weight = weight.to(getattr(torch, layer.dtype))
    if not math.isfinite(largest(stored_weight)):
        what = f"overflows {layer.dtype}" if math.isfinite(largest(weight)) else "is not finite"
        raise MpocError(f"{stored.path}: tensor {layer.name!r}, made of its cores, {what}")
    return stored_weight


def _refuse_too_large(path: Path, layer: LayerRecord) -> None:
    """Check that the dense weight and the matrix that it is made from fit into memory.

    Raises:
        MpocError: they do not.
    """
    entries = layer.num_original
    if not layer.structure.is_large_map:
        entries += math.prod(layer.structure.site_sizes)
    require_memory(path, layer.name, entries * max(4, ITEMSIZE[layer.dtype]))


def _cores(stored: Checkpoint, layer: LayerRecord) -> list[Tensor]:
    dtype = working_dtype(getattr(torch, layer.dtype))
    return [stored.read(name).to(dtype) for name in layer.core_names]


def _check_maps(
    stored: Checkpoint, manifest: Manifest, projected: Callable[[LayerRecord, float], None] | None
) -> None:
    """Refuse whole maps that are not convolutions up to rounding, or report their distance from the nearest.

    Raises:
        MpocError: there is such a map and ``projected`` is None.
    """
    for layer in manifest.replaced:
        if layer.geometry is None:
            continue
        error = project(MPO(_cores(stored, layer), layer.structure))[1]
        if error <= _ROUNDING * torch.finfo(getattr(torch, layer.stored_dtype)).eps:
            continue
        if projected is None:
            raise MpocError(
                f"layer {layer.layer}: its map is no longer a convolution: "
                f"the nearest one differs by {error:.2g} of its norm",
                "--project writes the nearest kernels",
            )
        projected(layer, error)


def _dense_entries(stored: Checkpoint, manifest: Manifest) -> list[Entry]:
    """Every tensor of the original checkpoint, in order; tied ones under each of their names."""
    replaced = {layer.core_name(0): layer for layer in manifest.replaced}
    cores = {name for layer in manifest.replaced for name in layer.core_names}
    entries: dict[str, Entry] = {}
    for name, info in stored.infos.items():
        if name in replaced:
            layer = replaced[name]
            dense = TensorInfo(layer.name, layer.dtype, layer.shape)
            entries[layer.name] = Entry(dense, lambda layer=layer: dense_weight(stored, layer))  # type: ignore[misc]
        elif name not in cores:
            entries[name] = Entry(info, lambda name=name: stored.read(name))  # type: ignore[misc]
    fingerprint = tensor_fingerprint(entry.info for entry in entries.values())
    if manifest.is_complete and fingerprint != manifest.source.fingerprint:
        raise MpocError(
            f"{stored.path}: some of the tensors of {manifest.source.name} are missing or changed",
            f"compress {manifest.source.name} again",
        )
    for alias, name in manifest.tied.items():
        if name not in entries:
            raise MpocError(f"{stored.path}: tensor {name!r} is missing")
        first = entries[name]
        entries[alias] = Entry(TensorInfo(alias, first.info.dtype, first.info.shape), first.read)
    return list(entries.values())
