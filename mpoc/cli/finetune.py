"""The command line of ``mpoc finetune`` as plain data.

``mpoc finetune``: train a compressed (or dense) network on a data set.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpoc.cli.console import Output, reported_errors
from mpoc.cli.data_options import (
    DATA,
    Block,
    Column,
    DataPath,
    Format,
    HoldOut,
    ImageSize,
    Mean,
    Std,
    Tokenizer,
    data_options,
)
from mpoc.cli.training_options import (
    L2,
    Accumulate,
    Batch,
    Best,
    Clip,
    DecayEvery,
    Device,
    Dropout,
    Epochs,
    EvalEvery,
    Gamma,
    GradientCheckpointing,
    LearningRate,
    Momentum,
    Nesterov,
    Optimizer,
    Patience,
    Precision,
    Runs,
    Schedule,
    Seed,
    Steps,
    Warmup,
    WeightDecay,
)
from mpoc.errors import UsageError

if TYPE_CHECKING:
    from mpoc.train.finetune import Finetuned, FinetuneRequest


_SETTINGS = (
    "steps", "batch", "accumulate", "optimizer", "lr", "momentum", "nesterov", "l2", "weight_decay",
    "schedule", "warmup", "gamma", "decay_every", "clip", "dropout", "precision", "gradient_checkpointing",
    "eval_every", "patience", "seed",
)  # fmt: skip
_REQUEST = (
    "output", "arch", "task", "teacher", "teacher_arch", "temperature", "hidden_weight", "runs", "device",
    "force", "resume", "log", "plot",
)  # fmt: skip

_WHAT = "What is learnt"
_OUT = "Output"


def training_request(values: dict[str, Any]) -> FinetuneRequest:
    """The options of ``mpoc finetune`` as plain data.

    Raises:
        UsageError: a value that cannot be read, or options that do not go together.
    """
    from mpoc.compression.recipe_syntax import parse_size
    from mpoc.train.finetune import FinetuneRequest
    from mpoc.train.settings import Settings

    every = re.fullmatch(r"([1-9]\d{0,14})(s?)", values["checkpoint_every"])
    if not every:
        raise UsageError(f"--checkpoint-every {values['checkpoint_every']}: not as 500 (steps) or 60s")
    when: dict[str, Any] = {"save_seconds": float(every[1])}
    if not every[2]:
        when = {"save_seconds": float("inf"), "save_steps": int(every[1])}
    if values["steps"] is not None and values["epochs"] is not None:
        raise UsageError("--steps and --epochs: one of them")
    if values["dropout"] is None and values["teacher"] is not None:
        values = values | {"dropout": 0.0}  # noise in the answers is nothing to learn from
    settings = Settings(**{name: values[name] for name in _SETTINGS}, keep_best=values["best"])
    return FinetuneRequest(
        values["model"],
        data_options(values["data"], values),
        settings if values["epochs"] is None else replace(settings, epochs=values["epochs"]),
        **{name: values[name] for name in _REQUEST},
        **when,
        max_shard_size=parse_size(values["max_shard_size"]),
    )


def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A compressed file or directory; or a dense checkpoint, with --arch."
        ),
    ],
    data: DataPath,
    format: Format = None,
    mean: Mean = None,
    std: Std = None,
    pad: Annotated[
        int | None,
        typer.Option(
            help="Augment: pad by so many pixels and crop at random. Default: as recorded, else 0.",
            rich_help_panel=DATA,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Augment: mirror half of the images. Default: as recorded, else not.",
            rich_help_panel=DATA,
        ),
    ] = None,
    size: ImageSize = None,
    tokenizer: Tokenizer = None,
    block: Block = None,
    column: Column = None,
    held_out: HoldOut = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="The dense network: one of the zoo, as resnet:depth=56, or package.module:factory or "
            "file.py:factory, which is run. A Hugging Face directory, and a file that records its zoo "
            "network, need none.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, causal-lm, masked-lm or distillation. Default: told from data, "
            "network and --teacher.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE",
            help="Learn to answer as this checkpoint does; needs no labels.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    teacher_arch: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK", help="The teacher's network. Default: MODEL's.", rich_help_panel=_WHAT
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Distillation: that of the logits.", rich_help_panel=_WHAT)
    ] = 2.0,
    hidden_weight: Annotated[
        float,
        typer.Option(
            help="Distillation: weight of the hidden states, where both networks give them.",
            rich_help_panel=_WHAT,
        ),
    ] = 1.0,
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = 64,
    accumulate: Accumulate = 1,
    optimizer: Optimizer = "adamw",
    lr: LearningRate = None,
    momentum: Momentum = 0.9,
    nesterov: Nesterov = False,
    l2: L2 = 0.0,
    weight_decay: WeightDecay = 0.0,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.0,
    gamma: Gamma = 0.99,
    decay_every: DecayEvery = 1,
    clip: Clip = None,
    dropout: Dropout = None,
    precision: Precision = "fp32",
    gradient_checkpointing: GradientCheckpointing = False,
    eval_every: EvalEvery = None,
    patience: Patience = None,
    best: Best = False,
    runs: Runs = 1,
    seed: Seed = 0,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="TUNED",
            help="Default: MODEL.tuned.safetensors or MODEL-tuned/ in the current directory.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the checkpoint of an interrupted training.", rich_help_panel=_OUT
        ),
    ] = False,
    checkpoint_every: Annotated[
        str,
        typer.Option(
            metavar="N|Ns",
            help="Steps between checkpoints, or seconds with an s.",
            rich_help_panel=_OUT,
        ),
    ] = "60s",
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Training log, JSON lines. Default: beside the output.", rich_help_panel=_OUT
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves: .png, .svg or .pdf.", rich_help_panel=_OUT),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file of a directory.", rich_help_panel=_OUT)
    ] = "5GB",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing output, log and checkpoint.", rich_help_panel=_OUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The history as JSON on stdout.", rich_help_panel=_OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=_OUT)
    ] = False,
) -> None:
    """Train a network on a data set: the cores and all else, from one process or many.

    With several processes or GPUs: torchrun -m mpoc finetune …, or accelerate launch -m mpoc finetune …

    --arch runs the code that it names.

    Examples:

    mpoc finetune resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --epochs 2 --lr 0.001

    mpoc finetune resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10 --teacher dense.pt --force
    """
    values = dict(locals())
    with reported_errors():
        words = Output(quiet)
        done = _run(values, words)
        if words.silent:
            return
        if as_json:
            _print_json(done)
        else:
            _print_lines(done, words)
        words.say(f"wrote {done.output}")
        if done.manifest is not None:
            words.next_command(f"mpoc report {done.output}")


def _run(values: dict[str, Any], words: Output) -> Finetuned:
    import shlex

    from mpoc.cli.progress import training_progress
    from mpoc.runtime.distributed import num_processes
    from mpoc.runtime.signals import Interrupted
    from mpoc.train.engine import leave
    from mpoc.train.finetune import finetune

    request = training_request(values)
    together = False
    try:
        with training_progress(words) as told:
            done = finetune(request, words.say, told)
        together = True
        return done
    except Interrupted as stop:
        together = True
        words.say(f"stopped at step {stop.step:,}; saved {request.checkpoint}")
        again = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
        command = f"mpoc {shlex.join(again)}" if num_processes() == 1 else "the same command with"
        words.next_command(f"{command} --resume")
        raise SystemExit(128 + stop.signum) from None
    finally:
        leave(together)


def _print_json(done: Finetuned) -> None:
    from mpoc.reporting.summary import to_json

    report = {"schema": "mpoc.training/1", "written": str(done.output), **done.training}
    report["examples_per_second"] = round(done.rate, 2)
    sys.stdout.write(to_json(report) + "\n")


def _print_lines(done: Finetuned, words: Output) -> None:
    from mpoc.cli.tables import scores_line
    from mpoc.reporting.summary import training_lines

    training = done.training
    for title in ("start", "final", "test"):
        if title in training:
            split = "" if title == "test" else f"{training['split']}, "
            words.result.print(f"{split}{title}: {scores_line(training[title])}", soft_wrap=True)
    earlier = {name: value for name, value in training.items() if name != "earlier"}
    words.result.print(training_lines(earlier)[-1], soft_wrap=True)
