"""The network of a checkpoint: from the zoo, from code that the user names, or by transformers.

A file holds tensors, no code. ``--arch resnet:depth=20`` names a network of the zoo, ``--arch
net.py:resnet20`` a function that makes the dense network; nothing is imported that was not named. Both are
recorded in the file, but a function is code and is run only where it is named again. A Hugging Face directory
names its own architecture.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError, nearest, shortened
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import Manifest
from mpoc.models import zoo
from mpoc.models.introspection import differing_names, kinds_of, tensors_of, trace_geometries
from mpoc.tensor_networks.geometry import Geometry


def make_network(arch: str) -> nn.Module:
    """The dense network that ``arch`` names: from the zoo, or what it names imported and called.

    Args:
        arch: ``resnet56``, ``resnet:depth=56``, ``package.module:factory`` or ``file.py:factory``.

    Raises:
        UsageError: not of that form, not found, or its result is no ``nn.Module``.
    """
    if _is_spec(arch):
        try:
            return zoo.make(arch)
        except ValueError as error:
            raise UsageError(f"--arch {arch!r}: {error}") from error
    place, _, name = arch.rpartition(":")
    if not place or not name:
        raise UsageError(
            f"--arch {arch!r}: not of the form package.module:factory or file.py:factory",
            "factory() returns the dense nn.Module; or a network of the zoo: "
            f"{', '.join([*zoo.SHORT_NAMES, *zoo.ENTRIES])}",
        )
    module = _import(arch, place)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(f"--arch {arch!r}: {place} has no {name!r} to call{nearest(name, known)}")
    network = factory()
    if not isinstance(network, nn.Module):
        raise UsageError(f"--arch {arch!r}: {name}() gives a {type(network).__name__}, not an nn.Module")
    return network


def _is_spec(arch: str) -> bool:
    """``resnet`` or ``resnet:depth=20``, where ``resnet:net`` is a function ``net`` of a module."""
    return re.fullmatch(r"[\w-]+(:\w*=.*)?", arch) is not None


def with_architecture(checkpoint: Checkpoint, arch: str) -> Checkpoint:
    """The checkpoint with its network named: kinds of layers are told from that network's modules.

    Raises:
        UsageError: as :func:`make_network`, or the tensors' names or shapes are not those of the network.
    """
    network = make_network(arch)
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    shapes |= {alias: shapes[first] for alias, first in checkpoint.tied.items()}
    said = _first_difference(network, shapes)
    if said:
        raise UsageError(
            f"{checkpoint.path}: does not fit --arch {arch}: {said}",
            "another --arch, or none: kinds of layers are then told from names and shapes",
        )
    record = {"zoo": zoo.long_form(arch)} if _is_spec(arch) else {"factory": arch}
    return replace(checkpoint, kinds=kinds_of(network), architecture=record)


def traced_geometries(arch: str, kernels: list[str]) -> dict[str, Geometry]:
    """The geometry of each kernel's convolution, from a sample run of a network of the zoo; else none.

    Raises:
        UsageError: a convolution is not reached, or cannot be taken as one map.
    """
    if not kernels or not _is_spec(arch):
        return {}
    return trace_geometries(make_network(arch), kernels, tuple(zoo.example(arch).shape))


def _first_difference(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str:
    """What differs first between a network and a checkpoint's tensors, in words; empty where nothing does."""
    missing, surplus = differing_names(network, shapes)
    sides = (("network", missing), ("checkpoint", surplus))
    lacking = [f"tensor {names[0]!r} is only in the {side}" for side, names in sides if names]
    if lacking:
        return ", ".join(lacking)
    for name, value in tensors_of(network).items():
        found = tuple(value.shape)
        if shapes.get(name, found) != found:
            return f"tensor {name!r} is {shapes[name]} in the checkpoint, {found} in the network"
    return ""


def make_recorded(source: Path, manifest: Manifest) -> nn.Module:
    """The dense network that a compressed file names by itself, from the zoo.

    Raises:
        UsageError: it names none, or a function, which is code and is not run unasked.
        MpocError: a network that this zoo does not have.
    """
    factory = manifest.architecture.get("factory")
    if factory is not None:
        place, _, name = factory.rpartition(":")
        module = Path(place).stem if place.endswith(".py") else place
        raise UsageError(
            f"{source}: its network is made by {factory}, which is code and is run only where it is named",
            f'from {module} import {name}; mpoc.load("{source}", {name}()); or --arch {factory}',
        )
    if not manifest.architecture:
        raise UsageError(
            f"{source}: holds tensors, not the network's code",
            f'mpoc.load("{source}", model), or --arch file.py:factory; factory() makes the dense network',
        )
    try:
        return zoo.make(manifest.architecture["zoo"])
    except ValueError as error:
        raise MpocError(
            f"{source}: its network is not of this zoo: {error}", "pip install --upgrade mpoc"
        ) from error


def example_input(source: Path, manifest: Manifest, arch: str | None) -> Tensor | None:
    """An input of one sample where the network, named or recorded, is one of the zoo.

    Raises:
        UsageError: the zoo does not have it.
    """
    spec = manifest.architecture.get("zoo") if arch is None else arch
    if spec is None or not _is_spec(spec):
        return None
    try:
        return zoo.example(spec)
    except ValueError as error:
        said = f"{source}: its network is not of this zoo" if arch is None else f"--arch {arch!r}"
        raise UsageError(f"{said}: {error}") from error


def _import(arch: str, place: str) -> ModuleType:
    file = Path(place)
    if file.suffix != ".py":
        with _searched(Path.cwd()):
            try:
                return import_module(place)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                    raise  # the user's module is there and lacks one of its own
                hint = "or name a file: file.py:factory"
                if place in zoo.ENTRIES:
                    hint = f"of the zoo: {place}, with options as in resnet:depth=56"
                raise UsageError(f"--arch {arch!r}: {error}", hint) from error
    if not file.is_file():
        raise UsageError(f"--arch {arch!r}: no such file")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with _searched(file.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported, as where Python runs a file of that folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def is_transformers_directory(source: Path, manifest: Manifest) -> bool:
    """Whether config.json says which network this is."""
    return not manifest.architecture and (source / "config.json").is_file()


def by_transformers(source: Path) -> nn.Module:
    """The compressed network, loaded: the class that config.json names where known, else ``AutoModel``.

    Raises:
        MpocError: transformers is missing or too old, or cannot make the network of these files alone.
    """
    try:
        import mpoc.hf  # noqa: F401  (teaches transformers to read cores)
    except ImportError as error:
        raise MpocError(str(error), "pip install 'mpoc[hf]', or --arch file.py:factory") from error
    import transformers

    # Never asked whether code that a directory brings along may be run: it may not.
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **own)
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise MpocError(f"{source}: transformers knows no network of this: {shortened(error)}") from error
    known = [getattr(transformers, name, None) for name in config.architectures or []]
    cls = next((found for found in known if found is not None), transformers.AutoModel)
    bar: Any = transformers.utils.logging
    shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        network: nn.Module = cls.from_pretrained(source, **own)
    finally:
        if shown:
            bar.enable_progress_bar()
    return network
