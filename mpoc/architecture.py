"""The network of a compressed checkpoint: built from code that the user names, or by transformers.

A file holds tensors, no code.  ``--arch resnet.py:resnet20`` names a function that makes the dense network;
nothing is imported that was not named.  A Hugging Face directory names its own architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mpoc.errors import MpocError, UsageError, nearest
from mpoc.loading import load


def open_network(source: Path, arch: str | None) -> nn.Module:
    """The network stored at ``source``, computing through its cores, in evaluation mode.

    Args:
        source: a compressed file or directory.
        arch: ``package.module:factory`` or ``file.py:factory``; None for what a directory's config.json says.

    Raises:
        UsageError: no architecture is known, or ``arch`` is not found or makes no network.
        MpocError: the file does not fit the network.
    """
    if arch is not None:
        return load(source, make_network(arch)).eval()
    if not (source / "config.json").is_file():
        raise UsageError(
            f"{source}: holds tensors, not the network's code",
            "--arch file.py:factory, where factory() makes the dense network",
        )
    return _by_transformers(source).eval()


def make_network(arch: str) -> nn.Module:
    """Import what ``arch`` names and call it.

    Raises:
        UsageError: not of that form, not found, or its result is no ``nn.Module``.
    """
    place, _, name = arch.rpartition(":")
    if not place or not name:
        raise UsageError(f"--arch {arch!r}: not of the form package.module:factory or file.py:factory")
    module = _import(arch, place)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(f"--arch {arch!r}: {place} has no {name!r} to call{nearest(name, known)}")
    network = factory()
    if not isinstance(network, nn.Module):
        raise UsageError(f"--arch {arch!r}: {name}() gives a {type(network).__name__}, not an nn.Module")
    return network


def _import(arch: str, place: str) -> ModuleType:
    file = Path(place)
    if file.suffix != ".py":
        with _searched(Path.cwd()):
            try:
                return import_module(place)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                    raise  # the user's module is there and lacks one of its own
                raise UsageError(f"--arch {arch!r}: {error}", "or name a file: file.py:factory") from error
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


def _by_transformers(source: Path) -> nn.Module:
    """The class that config.json names where transformers has it, else its ``AutoModel``."""
    try:
        import mpoc.hf  # noqa: F401  (teaches transformers to read cores)
    except ImportError as error:
        raise MpocError(str(error), "pip install 'mpoc[hf]', or --arch file.py:factory") from error
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    known = [getattr(transformers, name, None) for name in config.architectures or []]
    cls = next((found for found in known if found is not None), transformers.AutoModel)
    bar: Any = transformers.utils.logging
    shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        network: nn.Module = cls.from_pretrained(source, local_files_only=True)
    finally:
        if shown:
            bar.enable_progress_bar()
    return network
