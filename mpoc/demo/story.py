"""What ``mpoc demo`` does, with no printing: original, compressed and expanded file, accuracies."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from safetensors.torch import load_file

from mpoc.demo.data import accuracy, load_digits
from mpoc.demo.network import NETWORK_FILE, DigitsNet, load_network
from mpoc.errors import UsageError
from mpoc.expand import expand_checkpoint
from mpoc.pipeline import Compression, compress_checkpoint
from mpoc.recipe import make_recipe


@dataclass(frozen=True)
class Story:
    """Accuracies in per cent on the test images, and the files made: original, compressed, expanded."""

    accuracy_before: float
    accuracy_after: float
    images: int
    compression: Compression
    files: tuple[Path, Path, Path]


def tell_story(folder: Path, bond: int, force: bool) -> Story:
    """Compress the carried digits network into ``folder`` and measure it before and after.

    Raises:
        UsageError: ``folder`` exists and ``force`` is not given.
    """
    names = (NETWORK_FILE, "digits-cnn.mpo.safetensors", "digits-cnn.dense.safetensors")
    original, compressed, dense = (folder / name for name in names)
    recipe = make_recipe(None, {"bond": bond})
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file", "-o DIR writes elsewhere")
    if folder.exists() and not force:
        raise UsageError(f"{folder}: exists already", "--force goes on in it, -o DIR writes elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("mpoc.demo") / NETWORK_FILE) as carried:
        shutil.copyfile(carried, original)
    compression = compress_checkpoint(original, compressed, recipe, force)
    expand_checkpoint(compressed, dense, force)
    _, _, images, labels = load_digits()
    network = DigitsNet()
    network.load_state_dict(load_file(dense))
    return Story(
        accuracy(load_network(), images, labels),
        accuracy(network, images, labels),
        len(labels),
        compression,
        (original, compressed, dense),
    )
