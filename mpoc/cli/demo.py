"""``mpoc demo``: compress, expand, fine-tune and measure a network for handwritten digits."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpoc.cli.console import Output, escape, reported_errors
from mpoc.errors import UsageError
from mpoc.train.settings import Settings

if TYPE_CHECKING:
    from mpoc.compression.write import Compression

ARCH = "mpoc.demo.network:DigitsNet"
_SETTINGS = Settings(epochs=20.0, lr=0.01)


@dataclass(frozen=True)
class DemoFiles:
    """What the demo writes, in the order it does."""

    original: Path
    compressed: Path
    dense: Path
    digits: Path
    tuned: Path
    log: Path

    @classmethod
    def within(cls, folder: Path) -> DemoFiles:
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
class DemoResult:
    """Accuracies in per cent on the test images, and the files made."""

    accuracy_before: float
    accuracy_after: float
    images: int
    compression: Compression
    files: DemoFiles


def run_demo(folder: Path, bond: int, force: bool) -> DemoResult:
    """Compress the carried digits network into ``folder`` and measure it before and after.

    Raises:
        UsageError: ``folder`` exists and ``force`` is not given.
    """
    from safetensors.torch import load_file

    from mpoc.compression.expand import expand_checkpoint
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.recipe import make_recipe
    from mpoc.demo.data import accuracy, load_digits, write_digits
    from mpoc.demo.network import NETWORK_FILE, DigitsNet, load_network

    made = DemoFiles.within(folder)
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
    return DemoResult(before, after, len(labels), compression, made)


def fine_tune_demo(story: DemoResult) -> float | None:
    """Fine-tune the compressed file on the digits, as the first of its commands does.

    Returns:
        The accuracy after that, in per cent on the test images; None where accelerate is not installed.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    import torch

    from mpoc.train.engine import can_train
    from mpoc.train.finetune import FinetuneRequest, finetune
    from mpoc.train.training_data import DataOptions

    if not can_train():
        return None
    made = story.files
    request = FinetuneRequest(
        made.compressed, DataOptions(made.digits), _SETTINGS, made.tuned, ARCH, device="cpu", force=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    try:
        return float(finetune(request).training["final"]["accuracy"])
    finally:
        torch.set_num_threads(threads)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")] = Path(
        "mpoc-demo"
    ),
    bond: Annotated[int, typer.Option(help="Cap on every bond dimension D.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing DIR.")] = False,
) -> None:
    """Compress a small network for handwritten digits and fine-tune it: ρ table, accuracy at each stage.

    Fine-tuning takes seconds on a CPU, and needs pip install 'mpoc[train]'.

    Example: mpoc demo --bond 16
    """
    with reported_errors():
        from mpoc.cli.tables import print_report

        words = Output()
        story = run_demo(output, bond, force)
        done = story.compression
        words.result.print(f"accuracy before: {story.accuracy_before:.2f} % ({story.images} test images)")
        print_report(words.result, done.manifest, done.nbytes, done.seconds)
        words.result.print(f"accuracy after compression: {story.accuracy_after:.2f} %")
        again = _heal(story, words)
        words.result.print("files:")
        for file in story.files.written():
            words.result.print(f"  {file}", soft_wrap=True)
        if again:
            words.result.print("fine-tune and measure it yourself:")
            for command in again:
                words.result.print(f"  {command}", soft_wrap=True)
        words.next_command(f"mpoc report {story.files.tuned if again else story.files.compressed}")


def _heal(story: DemoResult, words: Output) -> list[str]:
    """Fine-tune and say how it went; the command lines that do the same, none where it could not."""
    from mpoc.runtime.signals import Interrupted

    try:
        healed = fine_tune_demo(story)
    except Interrupted as stop:
        words.say("stopped while fine-tuning; mpoc demo --force starts anew")
        raise SystemExit(128 + stop.signum) from None
    if healed is None:
        words.result.print(escape("left out: fine-tuning, which needs accelerate: pip install 'mpoc[train]'"))
        return []
    words.result.print(f"accuracy after fine-tuning: {healed:.2f} %")
    return story.files.commands()
