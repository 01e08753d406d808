"""Make the network of a checkpoint: from the zoo, from code that the user names, or with transformers.

A file holds tensors, not code. ``--arch resnet20`` names a network of the zoo, ``--arch net.py:resnet20`` a
function that returns the dense network. Both are recorded in the compressed file, but a recorded function is
run only where the user names it again. A Hugging Face directory names its own architecture.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError, nearest
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import Manifest
from mpoc.models import zoo
from mpoc.models.introspection import (
    UNUSED,
    differing_names,
    kinds_of,
    same_tensor,
    tensors_of,
    trace_geometries,
)
from mpoc.models.packaged import make_packaged
from mpoc.runtime.packages import is_packaged
from mpoc.tensor_networks.geometry import Geometry

if TYPE_CHECKING:
    from mpoc.hf.names import Filling


# Code that lies in a directory is never run.
_OWN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def make_network(arch: str) -> nn.Module:
    """Make the dense network that ``arch`` names: one of the zoo, or the result of a named function.

    Args:
        arch: ``resnet56``, ``resnet:depth=56``, ``torchvision:resnet18``, ``package.module:factory`` or
            ``file.py:factory``.

    Raises:
        UsageError: ``arch`` has another form, is not found, or does not return an ``nn.Module``.
    """
    if _is_spec(arch):
        try:
            return zoo.make(arch)
        except ValueError as error:
            raise UsageError(f"--arch {arch!r}: {error}") from error
    if is_packaged(arch):
        return make_packaged(arch)
    place, _, name = arch.rpartition(":")
    if not place or not name:
        raise UsageError(
            f"--arch {arch!r}: not of the form package.module:factory or file.py:factory",
            "factory() returns the dense nn.Module; or name a network of the zoo: "
            f"{', '.join([*zoo.SHORT_NAMES, *zoo.ENTRIES])}",
        )
    module = _import(arch, place)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(f"--arch {arch!r}: {place} has no {name!r} to call{nearest(name, known)}")
    with _one_message(f"--arch {arch!r}", UsageError):
        network = factory()
    if not isinstance(network, nn.Module):
        raise UsageError(f"--arch {arch!r}: {name}() returns a {type(network).__name__}, not an nn.Module")
    return network


def _is_spec(arch: str) -> bool:
    """Whether ``arch`` names a network of the zoo (``resnet:depth=20``), not a function (``net:make``)."""
    return re.fullmatch(r"[\w-]+(:\w*=.*)?", arch) is not None


def zoo_name(arch: str) -> str | None:
    """The entry of the zoo that ``arch`` names; None for a function."""
    name = zoo.long_form(arch).partition(":")[0]
    return name if name in zoo.ENTRIES else None


def with_architecture(checkpoint: Checkpoint, arch: str) -> Checkpoint:
    """The checkpoint with its architecture recorded, and with the kinds of layers from the network's modules.

    Tensors that the network does not have are left unchanged, with a note.

    Raises:
        UsageError: as :func:`make_network`, or a tensor of the network is missing or has another shape.
    """
    network = make_network(arch)
    checkpoint = named_as_in(network, checkpoint)
    difference, unused = first_difference(network, shapes_of(checkpoint))
    if difference:
        raise UsageError(
            f"{checkpoint.path}: does not fit --arch {arch}: {difference}",
            "pass another --arch, or none: layer kinds are then read from names and shapes",
        )
    record = {"zoo": zoo.long_form(arch)} if _is_spec(arch) else {"factory": arch}
    told = replace(
        checkpoint,
        kinds=kinds_of(network),
        left=dict.fromkeys(unused, UNUSED),
        architecture=record,
        notes=[*checkpoint.notes, *note_of_unused(unused)],
    )
    shared = same_tensor(network)
    return with_copies_tied(told, {name: min(shared[name]) for name in told.infos if name in shared})


def named_as_in(network: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the names of its file, where these fit the network and those without wrappers do not.

    A module of the network may itself be called ``module``.
    """
    if not checkpoint.wrapped or not first_difference(network, shapes_of(checkpoint))[0]:
        return checkpoint
    as_in_file = checkpoint.in_names_of_file()
    return checkpoint if first_difference(network, shapes_of(as_in_file))[0] else as_in_file


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, tied ones by each of their names."""
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    return shapes | {alias: shapes[first] for alias, first in checkpoint.tied.items()}


def note_of_unused(names: list[str]) -> list[str]:
    """A note on the tensors that a network does not have; none if there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"not in the network, kept unchanged: {', '.join(names[:3])}{more}"] if names else []


def traced_geometries(arch: str, kernels: list[str]) -> dict[str, Geometry]:
    """Trace the geometry of each kernel's convolution with one sample; {} for a network outside the zoo.

    Raises:
        UsageError: a convolution is not reached, or cannot be represented as one map.
    """
    if not kernels or not _is_spec(arch):
        return {}
    return trace_geometries(make_network(arch), kernels, tuple(zoo.example(arch).shape))


def first_difference(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[str, list[str]]:
    """The first thing that keeps a checkpoint from filling a network, "" if nothing, and unused tensors."""
    missing, surplus = differing_names(network, shapes)
    if missing:
        sides = (("network", missing), ("checkpoint", surplus))
        lacking = [f"tensor {names[0]!r} is only in the {side}" for side, names in sides if names]
        return ", ".join(lacking), surplus
    for name, value in tensors_of(network).items():
        shape = tuple(value.shape)
        if shapes.get(name, shape) != shape:
            said = f"tensor {name!r} is {shapes[name]} in the checkpoint, {shape} in the network"
            return said, surplus
    return "", surplus


def recorded_spec(manifest: Manifest) -> str | None:
    """The network that a compressed file names, as ``--arch`` takes it; None: none, or the user's code."""
    factory = manifest.architecture.get("factory", "")
    return manifest.architecture.get("zoo", factory if is_packaged(factory) else None)


def make_recorded(source: Path, manifest: Manifest) -> nn.Module:
    """Make the dense network of the zoo or of an installed package that a compressed file names.

    Raises:
        UsageError: the file names no network, or a function, which only the user may choose to run.
        MpocError: the zoo of this version does not have the network.
    """
    factory = manifest.architecture.get("factory")
    if factory is not None and is_packaged(factory):
        return make_packaged(factory)
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
            f'mpoc.load("{source}", model), or --arch file.py:factory; factory() returns the dense network',
        )
    try:
        return zoo.make(manifest.architecture["zoo"])
    except ValueError as error:
        raise MpocError(
            f"{source}: its network is not in the zoo: {error}", "pip install --upgrade mpoc"
        ) from error


def example_input(source: Path, manifest: Manifest, arch: str | None) -> Tensor | None:
    """One sample input of a network of the zoo, named by ``arch`` or recorded; None for any other network.

    Raises:
        UsageError: the zoo does not have the network.
    """
    spec = manifest.architecture.get("zoo") if arch is None else arch
    if spec is None or not _is_spec(spec):
        return None
    try:
        return zoo.example(spec)
    except ValueError as error:
        what = f"{source}: its network is not in the zoo" if arch is None else f"--arch {arch!r}"
        raise UsageError(f"{what}: {error}") from error


def _import(arch: str, place: str) -> ModuleType:
    file = Path(place)
    if file.suffix != ".py":
        with _searched(Path.cwd()), _one_message(f"--arch {arch!r}", UsageError):
            try:
                return import_module(place)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                    raise  # the user's module is there and lacks one of its own
                hint = "or name a file: file.py:factory"
                if place in zoo.ENTRIES:
                    hint = f"for the network of the zoo, --arch {place}, with options as in resnet:depth=56"
                raise UsageError(f"--arch {arch!r}: {error}", hint) from error
    if not file.is_file():
        raise UsageError(f"--arch {arch!r}: no such file")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with _searched(file.resolve().parent), _one_message(f"--arch {arch!r}", UsageError):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _one_message(what: str, kind: type[MpocError]) -> Iterator[None]:
    """Turn whatever code that is not ours raises into one error with its file, line and text.

    Args:
        what: names the code: an option, or a directory.
        kind: of the error.
    """
    try:
        yield
    except MpocError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        raise kind(f"{what}: {_place_of(error)}: {type(error).__name__}: {said}") from error


def _place_of(error: Exception) -> str:
    """File and line where an error was raised: the last that is of no installed package, or else the last."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1]))
    own = [frame for frame in frames if not frame.filename.startswith(installed)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}"


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Put ``folder`` first on Python's module search path, as when Python runs a file there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def is_transformers_directory(source: Path, manifest: Manifest) -> bool:
    """Whether the directory's config.json names the network."""
    return not manifest.architecture and (source / "config.json").is_file()


def with_config(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with kinds and ties told by the network that its config.json names.

    Where transformers is missing, or makes no such network of these tensors, names and shapes tell, and a
    note says why.
    """
    if not checkpoint.is_directory or checkpoint.config is None or find_spec("transformers") is None:
        return checkpoint
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    shapes |= {alias: shapes[first] for alias, first in checkpoint.tied.items()}
    try:
        fit, notes = _fit_directory(checkpoint.path, shapes)
    except MpocError as error:
        return replace(checkpoint, notes=[*checkpoint.notes, f"kinds told from names and shapes: {error}"])
    groups = {name: fit.groups.get(target) for name, target in fit.targets.items()}
    checkpoint = with_copies_tied(checkpoint, groups)
    stored = Counter(groups[name] for name in checkpoint.infos)
    by_module = kinds_of(fit.model)
    kinds: dict[str, tuple[str | None, bool]] = {}
    for name, target in fit.targets.items():
        if target in by_module and fit.names.converter(name) is None:
            aliases = sorted(fit.groups[target]) if stored[groups[name]] == 1 else ()
            group = [by_module[place] for place in (target, *aliases)]
            kinds[name] = next((kind for kind in group if kind[0] == "embedding"), group[0])
    left = {name: "converted by transformers while loading" for name in shapes if not fit.is_kept(name)}
    left |= dict.fromkeys(fit.unused, UNUSED)
    notes = [*checkpoint.notes, *notes, *note_of_unused(fit.unused)]
    return replace(checkpoint, kinds=kinds, left=left, notes=notes)


def with_copies_tied(checkpoint: Checkpoint, groups: Mapping[str, Hashable]) -> Checkpoint:
    """The checkpoint with equal copies of one weight held as one, whichever of its names are stored.

    Args:
        checkpoint: opened.
        groups: tensor → what it has in common with those that it may be a copy of; None: nothing.
    """
    firsts: dict[Hashable, list[str]] = {}
    tied: dict[str, str] = {}
    for name in checkpoint.infos:
        if groups.get(name) is None:
            continue
        others = firsts.setdefault(groups[name], [])
        first = next((other for other in others if _are_equal(checkpoint, name, other)), None)
        if first is None:
            others.append(name)
        else:
            tied[name] = first
    if not tied:
        return checkpoint
    kept = {name: info for name, info in checkpoint.infos.items() if name not in tied}
    earlier = {alias: tied.get(first, first) for alias, first in checkpoint.tied.items()}
    notes = [f"{name} is a copy of {first}: tied, and counted once" for name, first in tied.items()]
    return replace(checkpoint, infos=kept, tied=earlier | tied, notes=[*checkpoint.notes, *notes])


def _are_equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    one, two = checkpoint.infos[name], checkpoint.infos[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    return torch.equal(checkpoint.read(name), checkpoint.read(other))


def _fit_directory(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Filling, list[str]]:
    """The class of transformers that a directory's tensors fill, with a note where another is named.

    Raises:
        MpocError: transformers is missing or too old, or knows no such class.
    """
    try:
        import mpoc.hf  # noqa: F401  (teaches transformers to read cores)
    except ImportError as error:
        raise MpocError(str(error), "pip install 'mpoc[hf]', or --arch file.py:factory") from error
    import transformers

    from mpoc.hf.names import fitting_class

    with _one_message(f"{source}: transformers cannot make this network", MpocError):
        config = transformers.AutoConfig.from_pretrained(source, **_OWN)
        try:
            fit = fitting_class(config, shapes)
        except MpocError as error:
            raise MpocError(f"{source}: {error}", error.hint) from error
    cls, named = type(fit.model).__name__, config.architectures or []
    if cls in named or not named:
        return fit, []
    return fit, [f"config.json names {named[0]}, which the tensors do not fill: taken as {cls}"]


def by_transformers(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, list[str]]:
    """Load the network of a directory by the class that its tensors fill.

    Args:
        source: a directory, dense or compressed.
        shapes: of its dense tensors by their stored names, compressed weights included.

    Returns:
        The network, and a note where its class is not the one that config.json names.

    Raises:
        MpocError: transformers is missing or too old, or cannot make the network from these files alone; or
            a tensor of the network is missing or has another shape.
    """
    fit, notes = _fit_directory(source, shapes)
    cls: Any = type(fit.model)
    import transformers

    bar: Any = transformers.utils.logging
    was_shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        with _one_message(f"{source}: transformers cannot load this network", MpocError):
            network, info = cls.from_pretrained(source, output_loading_info=True, **_OWN)
    finally:
        if was_shown:
            bar.enable_progress_bar()
    for name, parameter in network.named_parameters():
        if name in fit.computed:
            parameter.requires_grad_(False)  # it would be trained, and not stored
    missing = sorted(info["missing_keys"])
    if missing:
        raise MpocError(
            f"{source}: {cls.__name__} needs tensors that are not stored: {', '.join(missing[:3])}"
        )
    return network, notes
