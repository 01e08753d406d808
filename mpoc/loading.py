"""Load a compressed file into a network: modules swapped, every name, shape and dtype checked."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.checkpoint.base import Checkpoint
from mpoc.errors import MpocError
from mpoc.expand import check_cores, open_compressed
from mpoc.manifest import LayerRecord, read_manifest
from mpoc.nn.adopt import adopt
from mpoc.nn.conv_map import check_geometry
from mpoc.structure import Structure


def load(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Turn ``model`` into the compressed network stored at ``path``.

        model = mpoc.load("resnet56.mpo.safetensors", resnet56())

    Args:
        path: a file or directory that ``mpoc compress`` wrote.
        model: the dense architecture, on any device, initialised in any way; changed in place.

    Returns:
        ``model``: the compressed layers compute through their cores, everything else is as stored. Devices,
        training mode, ``requires_grad``, hooks and tied weights are kept. Cores take the dtype of the weight
        they replace.

    Raises:
        MpocError: not compressed by mpoc or damaged; or names, shapes or dtypes differ between file and
            model, with both sides said. The model is unchanged then.
    """
    source = Path(path)
    manifest = read_manifest(source)
    stored = open_compressed(source)
    replaced = {layer.name: layer for layer in manifest.replaced}
    for layer in manifest.replaced:
        check_cores(stored, layer)
    _check(source, stored, replaced, manifest.tied, model)
    tied: dict[str, list[str]] = {}
    for alias, first in manifest.tied.items():
        tied.setdefault(first, []).append(alias)
    _swap(stored, replaced, tied, model)
    state = model.state_dict()
    others = _core_names(manifest.replaced) | _unsaved_buffers(model)
    with torch.no_grad():
        for name in stored.infos:
            for place in () if name in others else (name, *tied.get(name, ())):
                state[place].copy_(stored.read(name))
    forbid_save_pretrained(model)
    return model


def forbid_save_pretrained(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a network that got cores in memory, and of its parts, an error.

    transformers would not write what the cores are, and the directory would load with random weights.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            vars(module)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise MpocError(
        "save_pretrained cannot save a network that got its cores by mpoc.load or mpoc.compress",
        "mpoc compress a saved directory, import mpoc.hf, and load that with from_pretrained",
    )


def _core_names(layers: list[LayerRecord]) -> set[str]:
    return {layer.core_name(k) for layer in layers for k in range(len(layer.bonds) - 1)}


def _check(
    path: Path,
    stored: Checkpoint,
    replaced: dict[str, LayerRecord],
    tied: dict[str, str],
    model: nn.Module,
) -> None:
    """Compare the file's dense names, shapes and dtypes with the model's."""
    cores = _core_names(list(replaced.values()))
    offered = {n: (i.shape, i.dtype) for n, i in stored.infos.items() if n not in cores}
    offered |= {name: (layer.shape, layer.dtype) for name, layer in replaced.items()}
    offered |= {alias: offered[first] for alias, first in tied.items() if first in offered}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    known = same_tensor(model)
    # Batch norms saved before torch 0.4.1 do not count their batches; torch lets that pass too.
    expected = [name for name in state if not name.endswith("num_batches_tracked")]
    missing = [n for n in expected if n not in offered and not (known.get(n, set()) & offered.keys())]
    for name in _unsaved_buffers(model) & offered.keys():
        del offered[name]
    surplus = [n for n in offered if n not in state]
    if missing or surplus:
        raise MpocError(
            f"{path}: does not fit this {type(model).__name__}: "
            + "; ".join(
                f"{len(names)} tensors only in the {side} ({', '.join(names[:3])})"
                for side, names in (("model", missing), ("file", surplus))
                if names
            )
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = sorted(replaced.keys() - parameters)
    if buffers:
        raise MpocError(
            f"{path}: tensor {buffers[0]!r} is compressed in the file and a buffer in the model: "
            "cores can only be parameters",
            f"compress without it: --exclude '{buffers[0].removesuffix('.weight')}'",
        )
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise MpocError(f"{path}: tensor {empty[0]!r} of the model is on the meta device", "model.to_empty()")
    for name, (shape, dtype) in offered.items():
        found = tuple(state[name].shape), str(state[name].dtype).removeprefix("torch.")
        if found != (shape, dtype):
            raise MpocError(
                f"{path}: tensor {name!r} is {shape} {dtype} in the file, {found[0]} {found[1]} in the model"
            )
    for name, layer in replaced.items():
        if layer.geometry is not None:
            try:
                check_geometry(model.get_submodule(name.rpartition(".")[0]), layer.geometry)
            except ValueError as error:
                raise MpocError(f"{path}: layer {layer.layer}: {error}") from error


def _unsaved_buffers(model: nn.Module) -> set[str]:
    """Buffers that the network makes itself; older checkpoints hold some, as BERT's ``position_ids``."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def same_tensor(model: nn.Module) -> dict[str, set[str]]:
    """For each name, all names of the same parameter or buffer."""
    places: dict[int, set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        places.setdefault(id(tensor), set()).add(name)
    return {name: names for names in places.values() for name in names}


def adopt_everywhere(
    model: nn.Module, names: Sequence[str], cores: Sequence[Tensor], structure: Structure
) -> None:
    """Put cores in the place of weights that are one, by all their names; they then share them.

    The cores take the first's device, dtype and ``requires_grad``.
    """
    dense = model.get_parameter(names[0])
    own = [core.to(dense.device, dense.dtype).contiguous() for core in cores]
    parameters = [nn.Parameter(core, requires_grad=dense.requires_grad) for core in own]
    done = set()
    for name in names:
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        if (module, weight) not in done:  # a module in two places has two names
            adopt(module, weight, parameters, structure)
        done.add((module, weight))


def _swap(
    stored: Checkpoint, replaced: dict[str, LayerRecord], tied: dict[str, list[str]], model: nn.Module
) -> None:
    """Modules to their counterparts; where file and model differ in what is tied, the file decides."""
    known, apart = same_tensor(model), stored.infos.keys() | replaced.keys()
    for name, layer in replaced.items():
        cores = [stored.read(layer.core_name(k)).clone() for k in range(len(layer.bonds) - 1)]
        aliases = (known[name] - apart) | set(tied.get(name, ())) - {name}
        adopt_everywhere(model, [name, *sorted(aliases)], cores, layer.structure)
