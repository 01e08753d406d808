"""The options of a training or an evaluation as plain data: data set, settings, files.

Each field that is an option of ``mpoc finetune`` or ``mpoc eval`` carries its help; see
:mod:`mpoc.runtime.options`. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError, nearest, shortened
from mpoc.runtime.formatting import parse_size
from mpoc.runtime.options import ADVANCED, COMMON, argument, nested, option

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant", "exponential")
PRECISIONS = ("fp32", "bf16", "fp16")
LEARNING_RATES = {"sgd": 0.01, "adamw": 3e-4}
RATE_IN_FEW_BITS = 1e-3  # of adamw, for networks with layers in few bits
DEVICE_HELP = "Compute on auto, cpu, cuda, cuda:1, …"

_LARGEST = 1e30  # float32 has room for it and for what is made of it
_DATA, _TASK, _TRAINING = "Data", "Task", "Training"
# Fields of DataOptions that mpoc eval offers: nothing is augmented where nothing is trained.
_TO_MEASURE = ("path", "format", "mean", "std", "size", "tokenizer", "block", "column", "held_out")


def architecture_option(panel: str | None = COMMON) -> Any:
    """A field for the network of a checkpoint; None: its tensors or config.json tell it."""
    return option(
        "Name the network: auto, resnet20, …, or file.py:function.",
        None,
        metavar="NETWORK",
        panel=panel,
        parse=lambda text: None if text == "auto" else text,
        shown="auto",
    )


def parse_numbers(text: str) -> tuple[float, ...]:
    """``"0.5,0.5,0.5"`` → (0.5, 0.5, 0.5).

    Raises:
        UsageError: not numbers.
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UsageError(
            f"{shortened(text)} is not a list of numbers", "write them as 0.5,0.5,0.5"
        ) from error


def parse_image_size(text: str) -> tuple[int, int]:
    """``"28x32"`` → (28, 32), height and width; ``"32"`` → (32, 32).

    Raises:
        UsageError: not a size of an image.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise UsageError(f"{shortened(text)} is not a height and a width", "write it as 32x32")
    return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class CheckpointInterval:
    """The interval between checkpoints in seconds or steps, whichever comes first."""

    seconds: float = 60.0
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> CheckpointInterval:
        """``"500"`` (steps) or ``"60s"`` (seconds).

        Raises:
            UsageError: neither.
        """
        match = re.fullmatch(r"([1-9]\d{0,14})(s?)", text)
        if not match:
            raise UsageError(f"{shortened(text)} is neither steps nor seconds", "write it as 500 or 60s")
        return cls(float(match[1])) if match[2] else cls(math.inf, int(match[1]))


@dataclass(frozen=True)
class DataOptions:
    """The data set and its preprocessing; None: as in the network's history, or the default."""

    path: Path | None = option(
        "Read this file or folder of examples.",
        None, "--data", metavar="PATH", panel=COMMON, shown="self-made, to compare with a network",
    )  # fmt: skip
    format: str | None = option("Name the format where it is not recognised.", None, panel=_DATA)
    mean: tuple[float, ...] | None = option(
        "Subtract this from each channel's pixels (0 to 1).",
        None, metavar="M[,M,M]", panel=_DATA, parse=parse_numbers, shown="as recorded, else 0",
    )  # fmt: skip
    std: tuple[float, ...] | None = option(
        "Divide each channel's pixels by this.",
        None, metavar="S[,S,S]", panel=_DATA, parse=parse_numbers, shown="as recorded, else 1",
    )  # fmt: skip
    pad: int | None = option(
        "Augment: pad by N pixels, crop at random.",
        None,
        panel=_DATA,
        shown="as recorded, else 0",
    )
    flip: bool | None = option(
        "Augment: mirror half of the images.",
        None, "--flip/--no-flip", panel=_DATA, shown="as recorded, else not",
    )  # fmt: skip
    size: tuple[int, int] | None = option(
        "Resize images to this height and width.",
        None, "--image-size", metavar="HxW", panel=_DATA, parse=parse_image_size,
    )  # fmt: skip
    tokenizer: Path | None = option(
        "Tokenize text as this Hugging Face directory does.",
        None, metavar="DIR", panel=_DATA, shown="the model's own, else characters",
    )  # fmt: skip
    block: int | None = option(
        "Cut text into examples of this many tokens.", None, panel=_DATA, shown="the context, at most 256"
    )
    column: str | None = option("Choose the text column of a table.", None, panel=_DATA)
    held_out: float | None = option(
        "Hold out this share of training data to validate.",
        None, "--hold-out", panel=_DATA, shown="0.1 if needed",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All numbers of a training run; the same settings, data and start give the same result.

    ``l2`` is the coupled L2 of Eq. (7), Gao et al. 2020: (l2/2)·Σ|w|² over *all* parameters is part of the
    loss.  ``weight_decay`` is AdamW's decoupled decay (Loshchilov and Hutter 2019), another thing.
    """

    epochs: float = option("Pass this often over the training split.", 1.0, panel=COMMON)
    steps: int | None = option("Train for this many steps instead of epochs.", None, panel=_TRAINING)
    batch: int = option("Take this many examples per step, over all processes.", 64, panel=_TRAINING)
    accumulate: int = option("Split a process's share of a batch into this many parts.", 1, panel=_TRAINING)
    optimizer: str = option("Use sgd or adamw.", "adamw", panel=_TRAINING)
    lr: float | None = option(
        "Set the peak learning rate.",
        None,
        panel=_TRAINING,
        shown="sgd 0.01, adamw 0.0003 (0.001 in few bits)",
    )
    momentum: float = option("Set the momentum of sgd.", 0.9, panel=_TRAINING)
    nesterov: bool = option("Use Nesterov's momentum with sgd.", False, panel=_TRAINING)
    l2: float = option("Add (l2/2)·Σ|w|² over all parameters to the loss.", 0.0, panel=_TRAINING)
    weight_decay: float = option("Set the decoupled weight decay of adamw.", 0.0, panel=_TRAINING)
    betas: tuple[float, float] = (0.9, 0.999)  # adamw only
    schedule: str = option(
        "Vary the learning rate: cosine, constant or exponential.", "cosine", panel=_TRAINING
    )
    warmup: float = option("Warm up over this many steps; below 1, a share of all.", 0.0, panel=_TRAINING)
    gamma: float = option("Set the factor of the exponential schedule.", 0.99, panel=_TRAINING)
    decay_every: int = option("Apply the factor once in this many epochs.", 1, panel=_TRAINING)
    clip: float | None = option("Clip the gradient's norm, --l2 not counted.", None, panel=_TRAINING)
    dropout: float | None = option(
        "Set all dropout rates.", None, panel=_TRAINING, shown="the network's own; 0 with --teacher"
    )
    precision: str = option(  # parameters stay float32
        "Compute in fp32, bf16 or fp16 (GPU).", "fp32", panel=_TRAINING
    )
    gradient_checkpointing: bool = option(
        "Recompute activations backwards: less memory, more time.", False, panel=_TRAINING
    )
    eval_every: int | None = option(
        "Evaluate once in this many steps.", None, panel=_TRAINING, shown="once per epoch"
    )
    patience: int | None = option(  # implies keep_best
        "Stop after this many evaluations without gain; write the best weights.", None, panel=_TRAINING
    )
    keep_best: bool = option(
        "Write the weights that are best on the validation split.", False, "--best", panel=_TRAINING
    )
    seed: int = option("Seed everything that training draws.", 0, panel=_TRAINING)

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best evaluation are kept."""
        return self.keep_best or self.patience is not None

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            UsageError: a value out of its range, or options of another optimiser.
        """
        for name, value, known in (
            ("--optimizer", self.optimizer, OPTIMIZERS),
            ("--schedule", self.schedule, SCHEDULES),
            ("--precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise UsageError(f"{name} {value}: unknown{nearest(value, known)}", ", ".join(known))
        for name, number, least in (
            ("--epochs", self.epochs, 0.0),
            ("--steps", self.steps, 0),
            ("--batch", self.batch, 1),
            ("--accumulate", self.accumulate, 1),
            ("--lr", self.peak, 0.0),
            ("--l2", self.l2, 0.0),
            ("--weight-decay", self.weight_decay, 0.0),
            ("--warmup", self.warmup, 0.0),
            ("--decay-every", self.decay_every, 1),
            ("--eval-every", self.eval_every, 1),
            ("--patience", self.patience, 1),
            ("--clip", self.clip, 0.0),
        ):
            if number is not None and not least <= number <= _LARGEST:
                value = f"{number:g}" if abs(number) <= _LARGEST else shortened(number)
                raise UsageError(f"{name} {value}: must be finite and at least {least:g}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--momentum {self.momentum:g}: must be at least 0 and below 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout:g}: must be at least 0 and below 1")
        if not 0 < self.gamma <= 1:
            raise UsageError(f"--gamma {self.gamma:g}: must be above 0 and at most 1")
        self._check_together()

    def _check_together(self) -> None:
        if self.optimizer == "sgd" and self.weight_decay:
            raise UsageError("--weight-decay is AdamW's decoupled decay", "--l2, or --optimizer adamw")
        if self.l2 and self.weight_decay:
            raise UsageError("--l2 and --weight-decay exclude each other")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise UsageError("--nesterov needs --optimizer sgd with a momentum")


def make_settings(**given: Any) -> Settings:
    """Settings of the options that were given.

    Raises:
        UsageError: both epochs and steps.
    """
    if {"epochs", "steps"} <= given.keys():
        raise UsageError("--epochs and --steps exclude each other")
    return Settings(**given)


def default_tuned_output(source: Path) -> Path:
    """``m.mpo.safetensors`` or ``m.pt`` → ``m.tuned.safetensors``, ``bert-mpo/`` → ``bert-tuned``."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    if source.is_dir():
        return Path(source.name.removesuffix("-mpo") + "-tuned")
    return Path(source.stem.removesuffix(".mpo") + ".tuned.safetensors")


@dataclass(frozen=True)
class FinetuneRequest:
    """A training from file to file: what is trained on what, and where everything is written."""

    source: Path = argument("MODEL", "A compressed file or directory; or a dense checkpoint, with --arch.")
    data: DataOptions = nested(DataOptions)
    settings: Settings = nested(Settings, make=make_settings, default=Settings())
    output: Path | None = option(
        "Write here.",
        None, "--output -o", metavar="TUNED", panel=COMMON, shown="MODEL.tuned.safetensors or MODEL-tuned/",
    )  # fmt: skip
    arch: str | None = architecture_option()
    task: str | None = option(
        "Train classification, regression, causal-lm, masked-lm or distillation.",
        None, panel=_TASK, shown="inferred",
    )  # fmt: skip
    teacher: Path | None = option(
        "Learn to answer as this checkpoint does; needs no labels.", None, metavar="DENSE", panel=COMMON
    )
    teacher_arch: str | None = option(
        "Name the teacher's network.", None, metavar="NETWORK", panel=_TASK, shown="that of MODEL"
    )
    temperature: float = option("Distil logits at this temperature.", 2.0, panel=_TASK)
    hidden_weight: float = option("Weigh the distillation of hidden states.", 1.0, panel=_TASK)
    runs: int = option("Number of runs, with seeds seed, seed+1, …", 1, panel=_TRAINING)
    device: str = option(DEVICE_HELP, "auto", panel=_TRAINING)
    force: bool = option("Replace an existing output, log and checkpoint.", False, panel=COMMON)
    resume: bool = option("Resume from the checkpoint of an interrupted training.", False, panel=COMMON)
    checkpoint_every: CheckpointInterval = option(
        "Save a checkpoint every N steps, or N seconds.",
        CheckpointInterval(), metavar="N|Ns", panel=ADVANCED, parse=CheckpointInterval.parse, shown="60s",
    )  # fmt: skip
    log: Path | None = option(
        "Write the training log, as JSON lines.",
        None,
        metavar="FILE",
        panel=ADVANCED,
        shown="beside the output",
    )
    plot: Path | None = option("Draw the curves as .png, .svg or .pdf.", None, metavar="FILE", panel=ADVANCED)
    max_shard_size: int = option(
        "Limit each weight file of a directory.",
        5 * 10**9, metavar="SIZE", panel=ADVANCED, parse=parse_size, shown="5GB",
    )  # fmt: skip

    @property
    def target(self) -> Path:
        """The output."""
        return self.output or default_tuned_output(self.source)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of an interrupted training."""
        return self._beside(".checkpoint.safetensors")

    @property
    def log_file(self) -> Path:
        """The training log."""
        return self.log or self._beside(".jsonl")

    def _beside(self, ending: str) -> Path:
        return self.target.with_name(self.target.name.removesuffix(".safetensors") + ending)


@dataclass(frozen=True)
class EvaluationRequest:
    """A measurement of a file: which network on which data, and against which other."""

    source: Path = argument("MODEL", "A compressed file or directory; or a dense checkpoint, with --arch.")
    data: DataOptions = nested(DataOptions, only=_TO_MEASURE)
    split: str | None = option(
        "Measure on train, validation or test.", None, panel=COMMON, shown="test, else validation, else train"
    )
    arch: str | None = architecture_option()
    task: str | None = option(
        "Measure classification, regression, causal-lm or masked-lm.", None, panel=_TASK, shown="inferred"
    )
    reference: Path | None = option(
        "Measure similarity to this network instead; needs no labels.", None, metavar="MODEL2", panel=COMMON
    )
    stand_in: Path | None = None  # the reference where data and network make no task
    latency: bool = option("Time one example and --batch, compressed beside dense.", False, panel=COMMON)
    batch: int = option("Take this many examples at a time.", 256, panel=ADVANCED)
    device: str = option(DEVICE_HELP, "auto", panel=ADVANCED)
