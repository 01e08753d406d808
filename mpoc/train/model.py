"""A checkpoint opened to be trained or measured: its network, and where each tensor of the file is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.architecture import by_transformers, make_network, with_architecture
from mpoc.checkpoint import Checkpoint, open_checkpoint
from mpoc.errors import MpocError, UsageError
from mpoc.expand import open_compressed
from mpoc.header import read_header
from mpoc.loading import open_network
from mpoc.manifest import MANIFEST_FILE, Manifest
from mpoc.manifest_file import read_manifest


@dataclass
class Model:
    """A network with what its file says of it."""

    path: Path
    network: nn.Module  # on the CPU, in evaluation mode, parameters in float32 or better
    stored: Checkpoint  # the tensors of the file, cores under their own names
    manifest: Manifest | None  # None: dense
    architecture: str | None  # as --arch takes it, where known
    places: dict[str, str]  # name in the file → name of that parameter or buffer in the network
    notes: list[str] = field(default_factory=list)

    @property
    def history(self) -> dict[str, Any]:
        """What it says of its training; {}: nothing."""
        return self.stored.history if self.manifest is None else self.manifest.training


def is_compressed(path: Path) -> bool:
    """Whether ``mpoc compress`` made it; only names and a header are read."""
    if path.is_dir():
        return (path / MANIFEST_FILE).is_file()
    return path.is_file() and path.suffix == ".safetensors" and "mpoc" in read_header(path).metadata


def open_beside(path: Path, arch: str | None) -> Model:
    """Open a teacher or reference; ``arch``, the other network's, where this one does not say its own.

    Raises:
        UsageError: as :func:`open_model`.
        MpocError: as :func:`open_model`.
    """
    own = is_compressed(path) and "zoo" in read_manifest(path).architecture
    return open_model(path, None if own or (path / "config.json").is_file() else arch)


def open_model(path: Path, arch: str | None) -> Model:
    """Open a compressed or dense checkpoint with its network.

    Args:
        path: a file or a Hugging Face directory.
        arch: the dense network, as ``--arch`` names it; None for what the checkpoint says itself.

    Raises:
        UsageError: no architecture is known, or it is not found.
        MpocError: the checkpoint is damaged, or does not fit the network.
    """
    manifest = read_manifest(path) if is_compressed(path) else None
    if manifest is None:
        stored = open_checkpoint(path)
        network = _dense_network(stored, arch)
    else:
        stored, network = open_compressed(path), open_network(path, arch)
        arch = arch or manifest.architecture.get("zoo")
    notes = list(stored.notes)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
        network.float()
        notes.append("half-precision parameters are computed with, and trained, in float32")
    places, unused = _places(path, network, [*stored.infos, *stored.tied])
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"not in the network, kept as they are: {', '.join(unused[:3])}{more}")
    return Model(path, network.eval(), stored, manifest, arch, places, notes)


def _dense_network(stored: Checkpoint, arch: str | None) -> nn.Module:
    if arch is None:
        if stored.is_directory and (stored.path / "config.json").is_file():
            return by_transformers(stored.path)
        raise UsageError(
            f"{stored.path}: holds tensors, not the network's code",
            "--arch resnet:depth=56, or --arch file.py:factory, where factory() makes the network",
        )
    with_architecture(stored, arch)  # checks names and shapes
    network = make_network(arch)
    state = network.state_dict()
    with torch.no_grad():
        for name in (*stored.infos, *stored.tied):
            if name in state:
                state[name].copy_(stored.read(stored.tied.get(name, name)))
    return network


def _places(path: Path, network: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Where each tensor of the file is in the network, and which are nowhere.

    Raises:
        MpocError: a trained parameter is none of the file's tensors.
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
            f"{path}: which of its tensors is the network's {min(lost)!r} cannot be told "
            f"({len(lost)} such parameters)",
            "save the network again with its present library, and compress that",
        )
    return places, unused


def _names_in(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names of a file's tensors in the network: the same, but where transformers has names of its own."""
    same = {name: name for name in names}
    if not hasattr(network, "base_model_prefix"):
        return same
    import mpoc.hf  # noqa: F401  (refuses a transformers that is too old)
    from mpoc.hf_names import places

    found: Any = network
    return same | places(found, same)
