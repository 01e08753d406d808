"""What ``mpoc demo`` does, with no printing: compress, expand, fine-tune, and measure each time."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpoc.compression import Compression
from mpoc.demo.data import accuracy, load_digits, write_digits
from mpoc.demo.network import NETWORK_FILE, DigitsNet, load_network
from mpoc.errors import UsageError
from mpoc.expand import expand_checkpoint
from mpoc.pipeline import compress_checkpoint
from mpoc.recipe import make_recipe
from mpoc.train.engine import can_train
from mpoc.train.finetune import Request, finetune
from mpoc.train.material import DataOptions
from mpoc.train.settings import Settings

ARCH = "mpoc.demo.network:DigitsNet"
_SETTINGS = Settings(epochs=20.0, lr=0.01)


@dataclass(frozen=True)
class Files:
    """What the demo writes, in the order it does."""

    original: Path
    compressed: Path
    dense: Path
    digits: Path
    tuned: Path
    log: Path

    @classmethod
    def within(cls, folder: Path) -> Files:
        """Their names in ``folder``."""
        names = ("safetensors", "mpo.safetensors", "dense.safetensors", "tuned.safetensors", "tuned.jsonl")
        original, compressed, dense, tuned, log = (folder / f"digits-cnn.{name}" for name in names)
        return cls(original, compressed, dense, folder / "digits.npz", tuned, log)

    def written(self) -> list[Path]:
        """Those that are there."""
        return [file for file in vars(self).values() if file.exists()]

    def commands(self) -> list[str]:
        """The command lines that fine-tune and measure as the demo does."""
        words = f"--arch {ARCH} --data {shlex.quote(str(self.digits))}"
        compressed, tuned = (shlex.quote(str(file)) for file in (self.compressed, self.tuned))
        how = f"--epochs {_SETTINGS.epochs:g} --lr {_SETTINGS.lr:g} --device cpu"
        return [
            f"mpoc finetune {compressed} {words} {how} -o {tuned} --force",
            f"mpoc eval {tuned} {words}",
        ]


@dataclass(frozen=True)
class Story:
    """Accuracies in per cent on the test images, and the files made."""

    accuracy_before: float
    accuracy_after: float
    images: int
    compression: Compression
    files: Files


def tell_story(folder: Path, bond: int, force: bool) -> Story:
    """Compress the carried digits network into ``folder`` and measure it before and after.

    Raises:
        UsageError: ``folder`` exists and ``force`` is not given.
    """
    made = Files.within(folder)
    recipe = make_recipe(None, {"bond": bond})
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file", "-o DIR writes elsewhere")
    if folder.exists() and not force:
        raise UsageError(f"{folder}: exists already", "--force goes on in it, -o DIR writes elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("mpoc.demo") / NETWORK_FILE) as carried:
        shutil.copyfile(carried, made.original)
    compression = compress_checkpoint(made.original, made.compressed, recipe, force)
    expand_checkpoint(made.compressed, made.dense, force)
    write_digits(made.digits)
    _, _, images, labels = load_digits()
    network = DigitsNet()
    network.load_state_dict(load_file(made.dense))
    before, after = (accuracy(net, images, labels) for net in (load_network(), network))
    return Story(before, after, len(labels), compression, made)


def heal(story: Story) -> float | None:
    """Fine-tune the compressed file on the digits, as the first of its commands does.

    Returns:
        The accuracy after that, in per cent on the test images; None where accelerate is not installed.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    if not can_train():
        return None
    made = story.files
    request = Request(
        made.compressed, DataOptions(made.digits), _SETTINGS, made.tuned, ARCH, device="cpu", force=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the tensors are tiny: threads would wait for each other, long on a busy machine
    try:
        return float(finetune(request).training["final"]["accuracy"])
    finally:
        torch.set_num_threads(threads)
