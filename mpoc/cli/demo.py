"""``mpoc demo``: compress, expand, fine-tune and measure a network for handwritten digits."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.cli.console import Output, plain
from mpoc.cli.options import takes
from mpoc.errors import UsageError, command_line
from mpoc.runtime.options import option
from mpoc.train.settings import DataOptions, FinetuneRequest, Settings

if TYPE_CHECKING:
    from mpoc.compression.write import Compression

ARCH = "mpoc.demo.network:DigitsNet"
SETTINGS = Settings(epochs=20.0, lr=0.01)  # of the fine-tuning


@dataclass(frozen=True)
class DemoFiles:
    """The files that the demo writes, in that order."""

    original: Path
    compressed: Path
    dense: Path
    digits: Path
    tuned: Path
    log: Path

    @classmethod
    def within(cls, folder: Path) -> DemoFiles:
        """The files of a demo in ``folder``."""
        names = ("safetensors", "mpo.safetensors", "dense.safetensors", "tuned.safetensors", "tuned.jsonl")
        original, compressed, dense, tuned, log = (folder / f"digits-cnn.{name}" for name in names)
        return cls(original, compressed, dense, folder / "digits.npz", tuned, log)

    def written(self) -> list[Path]:
        """The files that exist."""
        return [file for file in vars(self).values() if file.exists()]

    def commands(self) -> list[str]:
        """The command lines that fine-tune and measure as the demo does."""
        data = f"--arch {ARCH} --data {shlex.quote(str(self.digits))}"
        compressed, tuned = (shlex.quote(str(file)) for file in (self.compressed, self.tuned))
        how = f"--epochs {SETTINGS.epochs:g} --lr {SETTINGS.lr:g} --device cpu"
        return [
            f"mpoc finetune {compressed} {data} {how} -o {tuned} --force",
            f"mpoc eval {tuned} {data}",
        ]


@dataclass(frozen=True)
class DemoResult:
    """Accuracies in per cent on the test images, and the files written."""

    accuracy_before: float
    accuracy_after: float
    images: int
    compression: Compression
    files: DemoFiles


def run_demo(folder: Path, bond: int, force: bool) -> DemoResult:
    """Compress the digits network of the package into ``folder`` and measure it before and after.

    Raises:
        UsageError: ``folder`` exists and ``force`` is not given.
    """
    from importlib.resources import as_file, files

    from safetensors.torch import load_file

    from mpoc.compression.expand import expand_checkpoint
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.recipe import make_recipe
    from mpoc.demo.data import accuracy, load_digits, write_digits
    from mpoc.demo.network import NETWORK_FILE, DigitsNet, load_network

    paths = DemoFiles.within(folder)
    recipe = make_recipe(None, {"bond": bond})
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file", "-o DIR writes elsewhere")
    if folder.exists() and not force:
        raise UsageError(f"{folder}: exists already", "--force replaces its files, -o DIR writes elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("mpoc.demo") / NETWORK_FILE) as carried:
        shutil.copyfile(carried, paths.original)
    compression = compress_checkpoint(paths.original, paths.compressed, recipe, force=force)
    expand_checkpoint(paths.compressed, paths.dense, force)
    write_digits(paths.digits)
    _, _, images, labels = load_digits()
    network = DigitsNet()
    network.load_state_dict(load_file(paths.dense))
    before, after = (accuracy(net, images, labels) for net in (load_network(), network))
    return DemoResult(before, after, len(labels), compression, paths)


def fine_tune_demo(result: DemoResult) -> float | None:
    """Fine-tune the compressed file on the digits, as the first of its commands does.

    Returns:
        The accuracy after that, in per cent on the test images; None where accelerate is not installed.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    import torch

    from mpoc.train.engine import can_train
    from mpoc.train.finetune import finetune

    if not can_train():
        return None
    paths = result.files
    request = FinetuneRequest(
        paths.compressed, DataOptions(paths.digits), SETTINGS, paths.tuned, ARCH, device="cpu", force=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    try:
        return float(finetune(request).training["final"]["accuracy"])
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class DemoOptions:
    """The command line of ``mpoc demo``."""

    output: Path = option("Write the files here.", Path("mpoc-demo"), "--output -o", metavar="DIR")
    bond: int = option("Cap every bond dimension D.", 8)
    force: bool = option("Replace an existing DIR.", False)


@takes(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Compress a small network for handwritten digits and fine-tune it: ρ table, accuracy at each stage.

    Fine-tuning takes seconds on a CPU; it needs accelerate, which the extra 'train' installs.

    Example: mpoc demo --bond 16
    """
    from mpoc.cli.tables import print_report

    console = Output()
    result = run_demo(options.output, options.bond, options.force)
    done = result.compression
    console.result.print(f"accuracy before: {result.accuracy_before:.2f} % ({result.images} test images)")
    print_report(console.result, done.manifest, done.nbytes, done.seconds)
    console.result.print(f"accuracy after compression: {result.accuracy_after:.2f} %")
    commands = _fine_tune(result, console)
    console.result.print("files:")
    for file in result.files.written():
        console.result.print(plain(f"  {file}"), soft_wrap=True)
    if commands:
        console.result.print("fine-tune and measure it yourself:")
        for command in commands:
            console.result.print(plain(f"  {command}"), soft_wrap=True)
    made = result.files.tuned if commands else result.files.compressed
    console.next_command(command_line("mpoc", "report", made))


def _fine_tune(result: DemoResult, console: Output) -> list[str]:
    """Fine-tune and print the accuracy; the command lines that do the same, none without accelerate."""
    from mpoc.runtime.signals import Interrupted

    try:
        accuracy = fine_tune_demo(result)
    except Interrupted as stop:
        console.say("stopped while fine-tuning; mpoc demo --force starts over")
        raise SystemExit(128 + stop.signum) from None
    if accuracy is None:
        skipped = "fine-tuning was skipped: it needs accelerate, pip install '.[train]'"
        console.result.print(skipped, soft_wrap=True)
        return []
    console.result.print(f"accuracy after fine-tuning: {accuracy:.2f} %")
    return result.files.commands()
