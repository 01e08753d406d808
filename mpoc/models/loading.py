"""Load a compressed file into a network, and open checkpoints for training and evaluation.

:func:`load` replaces modules by those with cores, after every name, shape and dtype of file and network was
compared. :func:`open_model` also opens dense checkpoints; it keeps which tensor of the network each tensor of
the file is, so that a trained network can be written back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError, excluding
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.keyed_store import Scratch
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import (
    CompressedCheckpoint,
    check_cores,
    is_compressed,
    open_checkpoint,
    open_compressed,
)
from mpoc.io.safetensors_writer import Entry
from mpoc.models.architecture import (
    by_transformers,
    is_transformers_directory,
    make_network,
    make_recorded,
    named_as_in,
    note_of_unused,
    recorded_spec,
    shapes_of,
    with_architecture,
    zoo_name,
)
from mpoc.models.auto_architecture import ToldArchitecture, tell_architecture
from mpoc.models.introspection import (
    UNUSED,
    compute_in_float32,
    differing_names,
    forbid_save_pretrained,
    same_tensor,
    tensors_of,
    unsaved_buffers,
)
from mpoc.models.saving import remember
from mpoc.nn.adopt import adopt_everywhere
from mpoc.nn.conv_map import check_geometry
from mpoc.nn.packed import PackedCores, PackedMatrix, pack_cores, pack_weight
from mpoc.nn.weight import Weights, check_weights, use_weights


def load(
    path: str | PathLike[str], model: nn.Module | None = None, *, weights: Weights = "auto"
) -> nn.Module:
    """Turn ``model`` into the compressed network stored at ``path``.

        >>> network = mpoc.load("digits-cnn.mpo.safetensors", DigitsNet()).eval()
        >>> with torch.no_grad():
        ...     network(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> network = mpoc.load("lenet5.mpo.safetensors")  # compressed with --arch lenet5: the file names it

    Args:
        path: a file or directory that mpoc wrote.
        model: the dense architecture, on any device, initialised in any way; changed in place. None: the
            network of the zoo that the file names, or what transformers makes of the directory's config.json;
            in eval mode.
        weights: what compressed layers compute from in eval mode; training always uses the cores.
            ``"cores"``: the cores. ``"dense"``: a dense weight that is built once, as fast and as large as
            before compression. ``"auto"``: whichever is faster for the number of vectors (images or tokens)
            in the call, by a cost model; layers where cores always win hold no dense weight. ``"packed"``:
            the codes of what is stored in few bits, decoded as they are used; this takes the least memory,
            and training leaves these weights as they are. :func:`mpoc.nn.use_weights` changes it later.

    Returns:
        ``model``: compressed layers have cores as parameters, everything else is as stored. Devices, training
        mode, ``requires_grad``, hooks and tied weights are kept. Cores take the dtype of the weight they
        replace.

    Raises:
        UsageError: ``weights`` has another value; or no ``model`` is given, and the file names none, or
            code, which is not run unasked.
        MpocError: the file was not compressed by mpoc or is damaged; or names, shapes or dtypes differ
            between file and model, with both sides named. The model is unchanged then.
    """
    check_weights(weights)
    return _load(Path(path), model, weights)[0]


def _load(source: Path, model: nn.Module | None, weights: Weights) -> tuple[nn.Module, list[str]]:
    """As :func:`load`, and notes for the user."""
    manifest = read_manifest(source)
    stored = open_compressed(source, manifest)
    if model is None and is_transformers_directory(source, manifest):
        model, notes = by_transformers(source, _dense_shapes(stored, manifest))
        _use(stored, manifest, model.eval(), weights)
        return model, notes
    for layer in manifest.replaced:
        check_cores(stored, layer)
    if model is None:
        model = _recorded_network(source, stored, manifest)
    _check(source, stored, manifest, model)
    _refuse_meta(source, model)
    _untie(stored, model)
    _fill(stored, manifest, model)
    codes = {layer.name: stored.coded_tensors(layer) for layer in manifest.changed if layer.storage}
    remember(model, manifest, codes)
    _use(stored, manifest, model, weights)
    forbid_save_pretrained(model)
    return model, []


def _use(stored: CompressedCheckpoint, manifest: Manifest, model: nn.Module, weights: Weights) -> None:
    """Choose what layers compute from; ``"packed"`` lets them hold the codes of the file."""
    use_weights(model, "auto" if weights == "packed" else weights)
    if weights != "packed":
        return
    same, places = same_tensor(model), _names_in(model, stored.infos)
    for layer in manifest.changed:
        parts = layer.coded_parts
        matrices = [PackedMatrix(stored.codes(part.name), _dtype(model, places[part.name])) for part in parts]
        for name in sorted(same[places[parts[0].name]]) if parts else ():
            if layer.core_names:
                path, _, cores = name.rpartition(".")[0].rpartition(".")
                module = model.get_submodule(path)
                pack_cores(module, cores, PackedCores(matrices, layer.core_shapes))
            elif parts[0].structure is not None:
                path, _, own = name.rpartition(".")
                pack_weight(model.get_submodule(path), own, matrices[0], parts[0].structure)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return model.get_parameter(name).dtype


def _dense_shapes(stored: Checkpoint, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The shapes of a compressed checkpoint's dense tensors, by the names they had before compression."""
    cores = _core_names(manifest.replaced)
    shapes = {name: info.shape for name, info in stored.infos.items() if name not in cores}
    shapes |= {layer.name: layer.shape for layer in manifest.replaced}
    return shapes | {alias: shapes[first] for alias, first in manifest.tied.items() if first in shapes}


def open_network(source: Path, arch: str | None) -> nn.Module:
    """The network stored at ``source``, computing through its cores, in eval mode.

    Args:
        source: a compressed file or directory.
        arch: the dense network, as ``--arch`` names it; None: the one that ``source`` names.

    Raises:
        UsageError: no architecture is known, or ``arch`` is not found or makes no network.
        MpocError: the file does not fit the network.
    """
    return _open_network(source, arch)[0]


def _open_network(source: Path, arch: str | None) -> tuple[nn.Module, list[str]]:
    """As :func:`open_network`, and notes for the user."""
    network, notes = _load(source, None if arch is None else make_network(arch), "cores")
    return network.eval(), notes


def _recorded_network(source: Path, stored: Checkpoint, manifest: Manifest) -> nn.Module:
    """The zoo's network in the file's dtype; names and shapes are compared before memory is allocated."""
    dtypes = {layer.dtype for layer in manifest.layers if "float" in layer.dtype}
    dtype = getattr(torch, dtypes.pop()) if len(dtypes) == 1 else torch.float32
    with torch.device("meta"):
        _check(source, stored, manifest, make_recorded(source, manifest).to(dtype))
    with torch.random.fork_rng(devices=[]):
        return make_recorded(source, manifest).to(dtype).eval()


def _core_names(layers: list[LayerRecord]) -> set[str]:
    return {name for layer in layers for name in layer.core_names}


def _check(path: Path, stored: Checkpoint, manifest: Manifest, model: nn.Module) -> None:
    """Compare names, shapes, dtypes and geometries of the file's dense weights with the model's.

    Raises:
        MpocError: they differ, or cores cannot take the place of a weight.
    """
    _check_tensors(path, stored, manifest, model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = sorted({layer.name for layer in manifest.replaced} - parameters)
    if buffers:
        raise MpocError(
            f"{path}: tensor {buffers[0]!r} is compressed in the file and a buffer in the model: "
            "cores can only be parameters",
            f"compress without it: {excluding(buffers[0].removesuffix('.weight'))}",
        )
    for layer in manifest.replaced:
        if layer.geometry is not None:
            try:
                check_geometry(model.get_submodule(layer.name.rpartition(".")[0]), layer.geometry)
            except ValueError as error:
                raise MpocError(f"{path}: layer {layer.layer}: {error}") from error


def _check_tensors(path: Path, stored: Checkpoint, manifest: Manifest, model: nn.Module) -> None:
    """Compare names, shapes and dtypes."""
    cores = _core_names(manifest.replaced)
    offered = {n: (i.shape, i.dtype) for n, i in stored.infos.items() if n not in cores}
    offered |= {layer.name: (layer.shape, layer.dtype) for layer in manifest.replaced}
    offered |= {alias: offered[first] for alias, first in manifest.tied.items() if first in offered}
    missing, surplus = differing_names(model, offered)
    surplus = [name for name in surplus if manifest.left_alone.get(name) != UNUSED]
    if missing or surplus:
        raise MpocError(
            f"{path}: does not fit this {type(model).__name__}: "
            + "; ".join(
                f"{len(names)} tensors only in the {side} ({', '.join(names[:3])})"
                for side, names in (("model", missing), ("file", surplus))
                if names
            )
        )
    for name, value in tensors_of(model).items():
        expected = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if offered.get(name, expected) != expected:
            stored_as, own = (f"{shape} {dtype}" for shape, dtype in (offered[name], expected))
            raise MpocError(f"{path}: tensor {name!r} is {stored_as} in the file, {own} in the model")


def _refuse_meta(path: Path, model: nn.Module) -> None:
    for name, value in tensors_of(model).items():
        if value.is_meta:
            raise MpocError(f"{path}: tensor {name!r} of the model is on the meta device", "model.to_empty()")


def _untie(stored: Checkpoint, model: nn.Module) -> None:
    """Untie parameters that are tied in the model but have different values in the file.

    Raises:
        MpocError: they belong to one module in two places.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    apart: list[tuple[nn.Module, str]] = []
    for name, names in same_tensor(model).items():
        first = min(names & stored.infos.keys(), default=name)
        if name == first or name not in stored.infos or torch.equal(stored.read(name), stored.read(first)):
            continue
        place, _, own = name.rpartition(".")
        if modules[place] is modules[first.rpartition(".")[0]]:
            raise MpocError(
                f"{stored.path}: {name!r} and {first!r} differ in the file and are one layer in the model"
            )
        apart.append((modules[place], own))
    for module, own in apart:
        shared = getattr(module, own)
        setattr(module, own, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))


def _fill(stored: Checkpoint, manifest: Manifest, model: nn.Module) -> None:
    """Put cores and all other tensors into a network that was checked."""
    tied: dict[str, list[str]] = {}
    for alias, first in manifest.tied.items():
        tied.setdefault(first, []).append(alias)
    _swap(stored, {layer.name: layer for layer in manifest.replaced}, tied, model)
    state = model.state_dict()
    others = _core_names(manifest.replaced) | unsaved_buffers(model)
    others |= {name for name, why in manifest.left_alone.items() if why == UNUSED}
    with torch.no_grad():
        for name in stored.infos:
            for place in () if name in others else (name, *tied.get(name, ())):
                state[place].copy_(stored.read(name))


def _swap(
    stored: Checkpoint, replaced: dict[str, LayerRecord], tied: dict[str, list[str]], model: nn.Module
) -> None:
    """Swap modules for their counterparts; where file and model differ in what is tied, the file decides."""
    known, apart = same_tensor(model), stored.infos.keys() | replaced.keys()
    places = list(tensors_of(model))
    for name, layer in replaced.items():
        cores = [stored.read(core).clone() for core in layer.core_names]
        # Names that are not stored belong to the first one that is.
        owner = next(place for place in places if place in known[name] & apart)
        aliases = set(tied.get(name, ())) | (known[name] - apart if owner == name else set())
        adopt_everywhere(model, [name, *sorted(aliases)], cores, layer.structure)


@dataclass
class Model:
    """A network with its checkpoint and what the checkpoint records."""

    path: Path
    network: nn.Module  # on the CPU, in eval mode, parameters in float32 or better
    stored: Checkpoint  # the tensors of the file, cores under their own names
    manifest: Manifest | None  # None: dense
    architecture: str | None  # as --arch takes it, where known
    places: dict[str, str]  # name in the file → name of the parameter or buffer in the network
    notes: list[str] = field(default_factory=list)
    # Layers that were trained and rounded again, by the name of the weight: record, and what the file holds.
    rounded: dict[str, tuple[LayerRecord, list[Entry]]] = field(default_factory=dict)

    @property
    def history(self) -> dict[str, Any]:
        """The recorded history of its training; {} where there is none."""
        return self.stored.history if self.manifest is None else self.manifest.training

    @property
    def zoo_spec(self) -> str | None:
        """The network as the zoo names it; None for any other network."""
        return self.architecture if self.architecture and zoo_name(self.architecture) else None


def open_beside(path: Path, arch: str | None) -> Model:
    """Open a teacher or reference; ``arch`` is the other network's, used where this one names none.

    Raises:
        UsageError: as :func:`open_model`.
        MpocError: as :func:`open_model`.
    """
    own = is_compressed(path) and recorded_spec(read_manifest(path)) is not None
    return open_model(path, None if own or (path / "config.json").is_file() else arch)


def open_model(path: Path, arch: str | None, scratch: Scratch | None = None) -> Model:
    """Open a compressed or dense checkpoint with its network.

    Args:
        path: a file or a Hugging Face directory.
        arch: the dense network, as ``--arch`` names it; None: the one that the checkpoint names, or that its
            tensors tell.
        scratch: for float32 copies of half-precision parameters, mapped into memory.

    Raises:
        UsageError: no architecture is known, or it is not found.
        MpocError: the checkpoint is damaged, or does not fit the network.
    """
    manifest = read_manifest(path) if is_compressed(path) else None
    if manifest is None:
        stored = open_checkpoint(path)
        told = tell_architecture(stored, arch)
        if (arch := told.arch) is not None:
            stored = named_as_in(make_network(arch), stored)
        network, notes = _dense_network(stored, told)
    else:
        stored = open_compressed(path, manifest)
        network, notes = _open_network(path, arch)
        arch = arch or recorded_spec(manifest)
    notes = [*stored.notes, *notes]
    if compute_in_float32(network, scratch):
        notes.append("half-precision parameters are computed with, and trained, in float32")
    places, unused = _places(path, network, [*stored.infos, *stored.tied])
    notes += note_of_unused(unused)
    return Model(path, network.eval(), stored, manifest, arch, places, notes)


def _dense_network(stored: Checkpoint, told: ToldArchitecture) -> tuple[nn.Module, list[str]]:
    if told.arch is None:
        if stored.is_directory and (stored.path / "config.json").is_file():
            network: Any
            network, notes = by_transformers(stored.path, shapes_of(stored))
            from mpoc.hf.names import hold_as_stored

            hold_as_stored(network, [*stored.infos, *stored.tied])
            return network, notes
        raise UsageError(
            f"{stored.path}: holds tensors, not the network's code{told.note and f'; {told.note}'}",
            "--arch resnet56, or --arch file.py:factory, where factory() returns the dense nn.Module",
        )
    with_architecture(stored, told.arch)  # checks names and shapes
    network = make_network(told.arch)
    _untie(stored, network)
    state = network.state_dict()
    with torch.no_grad():
        for name in (*stored.infos, *stored.tied):
            if name in state:
                state[name].copy_(stored.read(stored.tied.get(name, name)))
    return network, [told.note] if told.note else []


def _places(path: Path, network: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The name in the network of each tensor of the file, and the file's tensors that are not in it.

    Raises:
        MpocError: a parameter that is trained is not in the file.
    """
    first: dict[int, str] = {}
    known: dict[str, str] = {}
    tensors: list[tuple[str, Tensor]] = [*network.named_parameters(remove_duplicate=False)]
    tensors += network.named_buffers(remove_duplicate=False)
    for name, tensor in tensors:
        known[name] = first.setdefault(id(tensor), name)
    by_name = _names_in(network, names)
    places = {name: known[place] for name, place in by_name.items() if place in known}
    unused = [name for name in by_name if name not in places]
    lost = {name for name, p in network.named_parameters() if p.requires_grad} - set(places.values())
    if lost:
        raise MpocError(
            f"{path}: cannot find the tensor of the network's {min(lost)!r} ({len(lost)} such parameters)",
            "save the network again with its present library, and compress that",
        )
    return places, unused


def _names_in(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names of a file's tensors in the network; transformers renames some."""
    same = {name: name for name in names}
    if not hasattr(network, "base_model_prefix"):
        return same
    import mpoc.hf  # noqa: F401  (refuses a transformers that is too old)
    from mpoc.hf.names import places

    pretrained: Any = network
    return same | places(pretrained, same)
