"""The demo's trained network as a file, its digits as data, and what an output holds but for its goal."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save

from mpoc.cli.demo import ARCH
from mpoc.demo.data import write_digits
from mpoc.demo.network import NETWORK_FILE

ARCHITECTURE = ("--arch", ARCH)


def write_network(folder: Path) -> None:
    """``net.safetensors`` and ``digits.npz``."""
    with as_file(files("mpoc.demo").joinpath(NETWORK_FILE)) as file:
        shutil.copy(file, folder / "net.safetensors")
    write_digits(folder / "digits.npz")


def but_for_the_goal(output: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest without the goal, and all tensors."""
    with safe_open(output, "pt") as file:
        manifest = json.loads(file.metadata()["mpoc"])
    for goal in ("max_drop", "ratio"):
        manifest["options"].pop(goal, None)
    return manifest, save(load_file(output))
