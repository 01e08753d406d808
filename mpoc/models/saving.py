"""Save a network that computes through cores as a file, of the format that ``mpoc compress`` writes.

What a file records of its layers beside their cores (errors, spectra, why a layer stayed dense) is kept as
an attribute of the network, put there by :func:`remember` when it is compressed or loaded. Everything else is
read off the network when it is saved, so that the file tells dtypes, ties and trained cores as they are then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpoc
from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import refuse_existing, staged
from mpoc.io.checkpoint import tensor_fingerprint
from mpoc.io.coded_parts import coded_entries, rounding_of, with_codes
from mpoc.io.keyed_store import digest
from mpoc.io.manifest import HALF, LayerRecord, Manifest, Source, bond_fields, core_prefix
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_header import CODES, TensorInfo, count_parameters, encode_header, storage_order
from mpoc.io.safetensors_writer import Entry, write_safetensors
from mpoc.io.weight_files import output_bytes
from mpoc.models.introspection import tensors_of
from mpoc.nn.adopt import compressed_weights
from mpoc.reporting.summary import Report
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import working_dtype
from mpoc.tensor_networks.structure import Structure

_ATTRIBUTE = "_mpoc_origin"
_NOT_RECORDED = "dense, reason not recorded"


@dataclass(frozen=True)
class _Origin:
    """The manifest of a network that was compressed or loaded in memory."""

    manifest: Manifest
    digests: dict[str, str]  # name of the weight → digest of its cores, or of its rounded values, then
    codes: dict[str, dict[str, Tensor]]  # name of the weight → the tensors of a file that hold its codes


@dataclass(frozen=True)
class _CoreLayer:
    """A weight that is made from cores."""

    name: str
    structure: Structure
    cores: list[Tensor]


def remember(model: nn.Module, manifest: Manifest, codes: dict[str, dict[str, Tensor]]) -> None:
    """Keep on ``model`` what :func:`save` needs to know of the layers that were just given cores.

    Args:
        model: the network.
        manifest: of the whole network.
        codes: the tensors of a file that hold the codes of each rounded layer, by the name of its weight.
    """
    earlier = vars(model).get(_ATTRIBUTE)
    digests = {name: _digest(cores) for name, _, cores in compressed_weights(model)}
    state = tensors_of(model)
    digests |= {name: _digest([state[name]]) for name in codes if name in state}
    if earlier is not None:  # another part of the network was compressed before
        own = {layer.name for layer in manifest.layers}
        kept = tuple(layer for layer in earlier.manifest.layers if layer.name not in own)
        manifest = replace(manifest, layers=(*kept, *manifest.layers))
        digests |= earlier.digests
        codes = earlier.codes | codes
    vars(model)[_ATTRIBUTE] = _Origin(manifest, digests, codes)


def save(model: nn.Module, path: str | PathLike[str], *, force: bool = False) -> Report:
    """Write a network with compressed layers as a file, of the format that ``mpoc compress`` writes.

        >>> network = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
        >>> report = mpoc.compress(network, bond=4)
        >>> saved = mpoc.save(network, "network.mpo.safetensors")
        >>> mpoc.read_report("network.mpo.safetensors").rho == report.rho
        True

    ``mpoc report``, ``mpoc finetune --arch``, ``mpoc expand`` and :func:`mpoc.load` read the file. Cores keep
    the dtype they were stored in where the network still has the dtype it was loaded with. Layers that were
    rounded keep their codes; where their values changed meanwhile, they are rounded again to as many bits.

    Args:
        model: compressed by :func:`mpoc.compress` or loaded by :func:`mpoc.load`, on any device; unchanged. A
            network that transformers loaded from a directory is written as a directory.
        path: path of the file, which ends in ``.safetensors``.
        force: replace an existing file.

    Returns:
        The report of what was written, with the bytes on disk.

    Raises:
        UsageError: the file exists and ``force`` is not given, or it has another ending.
        MpocError: no layer of ``model`` is compressed, or a tensor has no data or a dtype that safetensors
            does not hold.
        OSError: writing failed (a full disk).
    """
    output = Path(path)
    if _is_of_transformers(model):
        return _save_directory(model, output, force)
    manifest, entries = describe(model)
    metadata = _metadata(manifest)
    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: the name of the file must end in .safetensors")
    _refuse_existing(output, force)
    with staged(output) as target:
        write_safetensors(target, entries, metadata)
    return Report(manifest, output_bytes(output))


def saved_bytes(manifest: Manifest, entries: list[Entry]) -> int:
    """Bytes of the file that :func:`save` writes of what :func:`describe` gives."""
    infos = [entry.info for entry in entries]
    header = encode_header(storage_order(infos), _metadata(manifest))
    return len(header) + sum(info.nbytes for info in infos)


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {"format": "pt", "mpoc": manifest.to_json()}


def _refuse_existing(output: Path, force: bool) -> None:
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output}: exists already", "force=True replaces it")
    refuse_existing(output, Path("a network in memory"), force)


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether ``from_pretrained`` made it of a compressed directory."""
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    return getattr(quantization, "quant_method", None) == "mpo" and _ATTRIBUTE not in vars(model)


def _save_directory(model: Any, output: Path, force: bool) -> Report:
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output}: exists already", "force=True replaces it")
    with staged(output) as target:
        model.save_pretrained(target)
    return Report(read_manifest(output), output_bytes(output))


def describe(model: nn.Module) -> tuple[Manifest, list[Entry]]:
    """The manifest and the tensors of a network's file, in the order of its state dict.

    Raises:
        MpocError: no layer of ``model`` is compressed, or a tensor cannot be written.
    """
    origins = dict(_origins(model))
    base = origins[""].manifest if "" in origins else None
    weights = {layer[0]: _CoreLayer(*layer) for layer in compressed_weights(model)}
    known = _known_records(origins)
    if not weights and not any(layer.storage for layer in known.values()):
        raise MpocError(
            f"no layer of this {type(model).__name__} is compressed, so there is nothing to save",
            "mpoc.compress(model, bond=4) compresses it; torch.save saves a dense network",
        )
    firsts, tied = _distinct(model, weights, base.tied if base else {})
    entries: list[Entry] = []
    infos: list[TensorInfo] = []
    records: list[LayerRecord] = []
    for name, tensor in firsts.items():
        if name in weights:
            record, own = _core_layer(weights[name], known.get(name), origins)
            records.append(record)
            infos.append(TensorInfo(name, record.dtype, record.shape))
            entries += own
        else:
            _check_writable(name, tensor)
            own = [Entry.of(name, tensor.detach())]
            infos.append(own[0].info)
            if name in known and known[name].form == "dense" and known[name].shape == tuple(tensor.shape):
                record, own = _dense_layer(tensor.detach(), known[name], origins)
                records.append(record)
            entries += own
    manifest = _manifest(model, base, origins, infos, records, tied)
    return manifest, [_as_halved(entry) for entry in entries] if manifest.halved else entries


def _as_halved(entry: Entry) -> Entry:
    """A float32 vector as float16 where that is exact, as in one that was read from float16."""
    if entry.info.dtype != "float32" or len(entry.info.shape) > 1:
        return entry
    tensor = entry.read()
    half = tensor.half()
    return Entry.of(entry.info.name, half) if torch.equal(half.float(), tensor) else entry


def _origins(model: nn.Module) -> Iterator[tuple[str, _Origin]]:
    """Prefix of names → what was remembered, of the network and of parts that were compressed alone."""
    for path, module in model.named_modules():
        if _ATTRIBUTE in vars(module):
            yield f"{path}." if path else "", vars(module)[_ATTRIBUTE]


def _known_records(origins: dict[str, _Origin]) -> dict[str, LayerRecord]:
    """The records by the weight's name in the network; those of the whole network win."""
    known: dict[str, LayerRecord] = {}
    for prefix, origin in reversed(origins.items()):
        known |= {
            prefix + layer.name: replace(layer, name=prefix + layer.name) for layer in origin.manifest.layers
        }
    return known


def _distinct(
    model: nn.Module, weights: dict[str, _CoreLayer], aliases: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor under one name, in order, and the other names of each.

    A weight made from cores stands under its own name, with its first core. Names that are among ``aliases``
    give way to others.
    """
    named: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    cores = {id(core) for layer in weights.values() for core in layer.cores}
    starts = {f"{core_prefix(name)}.0": name for name in weights}
    for name, value in tensors_of(model, keep_vars=True).items():
        if id(value) in cores and name not in starts:
            continue
        tensors[id(value)] = value
        named.setdefault(id(value), []).append(starts.get(name, name))
    firsts: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for key, names in named.items():
        first = next((name for name in names if name not in aliases), names[0])
        firsts[first] = tensors[key]
        tied |= {name: first for name in names if name != first}
    return firsts, tied


def _core_layer(
    layer: _CoreLayer, known: LayerRecord | None, origins: dict[str, _Origin]
) -> tuple[LayerRecord, list[Entry]]:
    """The updated record of a layer with cores, and what a file holds of it."""
    record = _record(layer, known, origins)
    if not record.storage:
        return record, _core_entries(layer, record)
    kept = _kept_codes(layer.name, layer.cores, origins)
    return (record, kept) if kept else _rounded_again(record, layer.cores)


def _dense_layer(
    weight: Tensor, known: LayerRecord, origins: dict[str, _Origin]
) -> tuple[LayerRecord, list[Entry]]:
    """The updated record of a layer that stays dense, and what a file holds of it."""
    dtype = str(weight.dtype).removeprefix("torch.")
    record = replace(known, dtype=dtype, stored_dtype=dtype)
    if not record.storage:
        return record, [Entry.of(record.name, weight)]
    kept = _kept_codes(record.name, [weight], origins)
    return (record, kept) if kept else _rounded_again(changed_record(record, [weight]), [weight])


def _kept_codes(name: str, tensors: list[Tensor], origins: dict[str, _Origin]) -> list[Entry]:
    """What a file held of a rounded layer, under its name in this network; [] where its values changed."""
    now = _digest(tensors)
    for prefix, origin in origins.items():
        own = name.removeprefix(prefix)
        if own in origin.codes and origin.digests.get(own) == now:
            return [Entry.of(prefix + name, tensor) for name, tensor in origin.codes[own].items()]
    return []


def _rounded_again(record: LayerRecord, tensors: Sequence[Tensor]) -> tuple[LayerRecord, list[Entry]]:
    """A layer whose values changed, rounded to the nearest codes of as many bits."""
    codes = rounding_of(record).codes(record, tensors)
    record = with_codes(record, codes)
    return record, coded_entries(record, codes)


def _record(layer: _CoreLayer, known: LayerRecord | None, origins: dict[str, _Origin]) -> LayerRecord:
    """The updated record of a layer; a new record for an unknown layer."""
    dtype = str(layer.cores[0].dtype).removeprefix("torch.")
    shapes = [tuple(core.shape) for core in layer.cores]
    if known is None or known.form == "dense" or known.core_shapes != shapes:
        return _new_record(layer, dtype)
    if dtype != known.dtype:
        known = replace(known, dtype=dtype, stored_dtype=dtype)
    now = _digest(layer.cores)
    if any(origin.digests.get(layer.name.removeprefix(prefix)) == now for prefix, origin in origins.items()):
        return known
    return changed_record(known, layer.cores)


def _new_record(layer: _CoreLayer, dtype: str) -> LayerRecord:
    structure, form = layer.structure, form_of(layer.cores, layer.structure)
    return LayerRecord(
        name=layer.name,
        kind=structure.kind,
        shape=structure.shape,
        dtype=dtype,
        form=structure.form,
        num_original=structure.num_original,
        num_stored=form.num_parameters,
        stored_dtype=dtype,
        transposed=structure.transposed,
        output_factors=structure.output_factors,
        input_factors=structure.input_factors,
        **bond_fields(structure, form.bonds),
        padding=structure.padding,
        geometry=structure.geometry,
        order=structure.order,
    )


def changed_record(layer: LayerRecord, tensors: Sequence[Tensor]) -> LayerRecord:
    """The record once its cores, or its dense weight, were trained: no error is known any more."""
    entropies: tuple[float, ...] = ()
    if layer.core_names:
        dtype = working_dtype(getattr(torch, layer.dtype))
        own = [core.detach().to("cpu", dtype) for core in tensors]
        entropies = tuple(map(rounded, form_of(own, layer.structure).entropies()))
    return replace(
        layer,
        relative_error=None,
        output_error=None,
        held_out_error=None,
        same_size=None,
        entropies=entropies,
    )


def changed_manifest(manifest: Manifest) -> Manifest:
    """The manifest once the network was trained, without what was measured of its outputs before."""
    calibration = {name: fact for name, fact in manifest.calibration.items() if name != "likeness"}
    return replace(manifest, calibration=calibration, measured={})


def _core_entries(layer: _CoreLayer, record: LayerRecord) -> list[Entry]:
    dtype = getattr(torch, record.stored_dtype)
    for name, core in zip(record.core_names, layer.cores, strict=True):
        _check_writable(name, core)
    infos = [
        TensorInfo(name, record.stored_dtype, shape)
        for name, shape in zip(record.core_names, record.core_shapes, strict=True)
    ]
    return [
        Entry(info, lambda core=core: core.detach().to(dtype))  # type: ignore[misc]
        for info, core in zip(infos, layer.cores, strict=True)
    ]


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise MpocError(f"tensor {name!r} is on the meta device: it has no data to save")
    if str(tensor.dtype).removeprefix("torch.") not in CODES:
        raise MpocError(f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold")


def _manifest(
    model: nn.Module,
    base: Manifest | None,
    origins: dict[str, _Origin],
    infos: list[TensorInfo],
    records: list[LayerRecord],
    tied: dict[str, str],
) -> Manifest:
    """The manifest of the whole network with its present layers, tensors and ties."""
    fingerprint = tensor_fingerprint(infos)
    nbytes = sum(info.nbytes for info in infos)
    source = Source(f"<{type(model).__name__}>", nbytes, count_parameters(infos), fingerprint)
    if base is None:
        base = Manifest(source, (), {}, "the model's modules", tool=f"mpoc {mpoc.__version__}")
    errors = {record.name: record.relative_error for record in base.layers}
    if any(errors.get(record.name) != record.relative_error for record in records):
        base = changed_manifest(base)
    reasons = {
        prefix + name: why
        for prefix, origin in origins.items()
        for name, why in origin.manifest.left_alone.items()
    }
    names = {record.name for record in records}
    matrices = [info.name for info in infos if len(info.shape) > 1 and info.name not in names]
    left = {name: reasons.get(name, _NOT_RECORDED) for name in matrices}
    return replace(
        base,
        source=base.source if base.source.fingerprint == fingerprint else source,
        layers=tuple(records),
        left_alone=left,
        vectors=len(infos) - len(records) - len(left),
        tied=tied,
        halved=_halved_dtype(origins, infos),
    )


def _halved_dtype(origins: dict[str, _Origin], infos: list[TensorInfo]) -> str:
    """What readers get for float16 vectors of the file; empty where the network has some of its own."""
    own = any(info.dtype == HALF and len(info.shape) <= 1 for info in infos)
    return "" if own else max((origin.manifest.halved for origin in origins.values()), default="")


def _digest(cores: list[Tensor]) -> str:
    return digest((str(number), core) for number, core in enumerate(cores))
