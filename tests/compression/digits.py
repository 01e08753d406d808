"""The demo's trained network as a file, and its digits as data."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from mpoc.cli.demo import ARCH
from mpoc.demo.data import write_digits
from mpoc.demo.network import NETWORK_FILE

ARCHITECTURE = ("--arch", ARCH)


def write_network(folder: Path) -> None:
    """``net.safetensors`` and ``digits.npz``."""
    with as_file(files("mpoc.demo").joinpath(NETWORK_FILE)) as file:
        shutil.copy(file, folder / "net.safetensors")
    write_digits(folder / "digits.npz")
