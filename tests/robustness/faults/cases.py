"""The commands that write something, each on small models, with and without an old output to replace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.demo.network import DigitsNet
from tests.robustness.faults.child import Fault, attempt, command
from tests.support.checkpoints import contents, network_state, save_directory

_AT_HAND = (
    "mpoc",
    "rich",
    "typer",
    "safetensors",
    "importlib",
    "concurrent",
    "json",
    "email",
    "zipfile",
    "accelerate",
    "torch",
)
_COMPRESS = ("--max-error", "0.9", "--device", "cpu", "--max-shard-size", "8kB")

_RECIPE = """bond = 8
exclude = ["tiny"]
sites = 3
[layer."f*"]
bond = 4
form = "svd"
[layer.conv]
dense = true
"""


@dataclass(frozen=True)
class Case:
    """A command in a folder that holds the inputs of all, and where its output goes."""

    arguments: tuple[str, ...]
    output: str
    old: bool = False  # whether there is an output already, to be replaced
    kept: tuple[str, ...] = ()  # what an interrupted one may leave, to go on from
    aside: tuple[str, ...] = ()  # what is written besides, line by line


def _cases() -> Iterator[Case]:
    for source, output in (("m.pt", "out.safetensors"), ("m", "out")):
        plain = ("compress", source, *_COMPRESS, "-o", output)
        yield Case(plain, output)
        yield Case((*plain, "--resume"), output, kept=(f"{output}.partial",))
    yield Case(("expand", "c.safetensors", "-o", "dense.safetensors"), "dense.safetensors")
    yield Case(("expand", "c", "-o", "dense", "--max-shard-size", "16kB"), "dense")
    yield Case(("report", "c", "--html", "report.html"), "report.html")


_DIGITS = ("--arch", "mpoc.demo.network:DigitsNet", "--data", "digits.npz", "--epochs", "1", "--batch", "8")
TRAIN = ("d.safetensors", *_DIGITS, "--device", "cpu", "--checkpoint-every", "1")
FINETUNE = Case(
    ("finetune", *TRAIN, "-o", "t.safetensors"),
    "t.safetensors",
    kept=("t.checkpoint.safetensors",),
    aside=("t.jsonl",),
)
_FIT = ("--calibrate", "digits.npz", "--calibration-samples", "16", "--ratio", "0.5", "--form", "svd")
CALIBRATED = Case(
    ("compress", "digits.pt", *_DIGITS[:2], *_FIT, "--device", "cpu", "--resume", "-o", "out.safetensors"),
    "out.safetensors",
    kept=("out.safetensors.partial",),
)
_PLAIN = [*_cases()]
CASES = [
    *_PLAIN,
    *(replace(case, old=True, arguments=(*case.arguments, "--force")) for case in _PLAIN),
    FINETUNE,
    CALIBRATED,
]


@dataclass(frozen=True)
class Material:
    """Folders to copy from: the inputs of all commands, and old outputs by their names."""

    inputs: Path
    old: Path

    @contextmanager
    def copied(self, case: Case | None = None) -> Iterator[Path]:
        """A folder with the inputs, and the case's old output."""
        with TemporaryDirectory(prefix="mpoc-faults-") as holder:
            folder = Path(holder) / "work"
            shutil.copytree(self.inputs, folder)
            if case is not None and case.old:
                _copy(self.old / case.output, folder / case.output)
            yield folder


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


@contextmanager
def material() -> Iterator[Material]:
    """Small models made on the spot, by one thread."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="mpoc-faults-") as holder:
        found = Material(Path(holder) / "inputs", Path(holder) / "old")
        for folder in (found.inputs, found.old):
            folder.mkdir()
        _make_inputs(found.inputs)
        _make_old(found)
        yield found


def _make_inputs(folder: Path) -> None:
    torch.manual_seed(0)
    state = network_state()
    torch.save(state, folder / "m.pt")
    save_directory(folder / "m", state, shards=3)
    recipe = make_recipe(None, {"bond": 4, "device": "cpu", "max_shard_size": 8000})
    compress_checkpoint(folder / "m.pt", folder / "c.safetensors", recipe)
    compress_checkpoint(folder / "m", folder / "c", recipe)
    save_file(state, folder / "m.safetensors")
    (folder / "recipe.toml").write_text(_RECIPE)
    digits = DigitsNet().state_dict()
    torch.save(digits, folder / "digits.pt")
    compress_checkpoint(folder / "digits.pt", folder / "d.safetensors", recipe)
    save_directory(folder / "digits", digits, shards=2)
    compress_checkpoint(folder / "digits", folder / "d", replace(recipe, max_shard_size=2000))
    images = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "digits.npz", x=images, y=np.arange(32) % 10)
    stopped = attempt(command("finetune", *TRAIN), folder, Fault("SIGTERM", "files", 25))
    assert stopped.status == 143, stopped.err  # and leaves d.tuned.checkpoint.safetensors


def _make_old(found: Material) -> None:
    """Outputs of other options."""
    recipe = make_recipe(None, {"bond": 2, "device": "cpu"})
    compress_checkpoint(found.inputs / "m.pt", found.old / "out.safetensors", recipe)
    compress_checkpoint(found.inputs / "m", found.old / "out", recipe)
    shutil.copyfile(found.old / "out.safetensors", found.old / "dense.safetensors")
    shutil.copytree(found.old / "out", found.old / "dense")
    (found.old / "report.html").write_text("an old page")


@dataclass(frozen=True)
class Undisturbed:
    """A case as it goes when nothing goes wrong."""

    new: dict[str, bytes]  # contents of the output
    moments: dict[str, int]


def undisturbed(case: Case, made: Material) -> Undisturbed:
    """Run it once; what it imports is imported here."""
    with made.copied(case) as folder:
        ended = attempt(command(*case.arguments), folder, counted=True)
        assert ended.status == 0, ended.err
        for name in ended.modules:
            if name.split(".")[0] in _AT_HAND:
                import_module(name)  # the children to come need not
        return Undisturbed(contents(folder / case.output), ended.moments)
