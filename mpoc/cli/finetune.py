"""``mpoc finetune``: train a compressed (or dense) network on a data set."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.errors import command_line
from mpoc.runtime.options import ADVANCED, nested, option
from mpoc.train.settings import FinetuneRequest

if TYPE_CHECKING:
    from mpoc.train.finetune import Finetuned


def training_request(**given: Any) -> FinetuneRequest:
    """The request of the options that were given.

    Raises:
        UsageError: options that exclude each other.
    """
    request = FinetuneRequest(**given)
    if request.teacher is not None and request.settings.dropout is None:
        # Dropout would add noise to the answers that are learnt.
        return replace(request, settings=replace(request.settings, dropout=0.0))
    return request


@dataclass(frozen=True)
class FinetuneOptions:
    """The command line of ``mpoc finetune``."""

    request: FinetuneRequest = nested(FinetuneRequest, make=training_request)
    as_json: bool = option("Print the history as JSON on stdout.", False, "--json", panel=ADVANCED)
    quiet: bool = option("Print no progress.", False, panel=ADVANCED)


@takes(FinetuneOptions)
def finetune(options: FinetuneOptions) -> None:
    """Train a network on a data set: the cores and all else, from one process or many.

    With several processes or GPUs: torchrun -m mpoc finetune …, or accelerate launch -m mpoc finetune …

    --arch file.py:function runs that code. Data formats: mpoc guide.

    Examples:

    mpoc finetune resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --epochs 2 --lr 0.001

    mpoc finetune resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10 --teacher dense.pt --force
    """
    console = Output(options.quiet)
    result = _run(options.request, console)
    if console.silent:
        return
    if options.as_json:
        _print_json(result)
    else:
        _print_lines(result, console)
    console.say(f"wrote {result.output}")
    if result.manifest is not None:
        console.next_command(command_line("mpoc", "report", result.output))


def _run(request: FinetuneRequest, console: Output) -> Finetuned:
    from mpoc.cli.progress import training_progress
    from mpoc.runtime.distributed import num_processes
    from mpoc.runtime.signals import Interrupted
    from mpoc.train.engine import leave
    from mpoc.train.finetune import finetune

    together = False
    try:
        with training_progress(console) as progress:
            result = finetune(request, console.say, progress)
        together = True
        return result
    except Interrupted as stop:
        together = True
        console.say(f"stopped at step {stop.step:,}; saved {request.checkpoint}")
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
        command = f"mpoc {shlex.join(words)}" if num_processes() == 1 else "the same command with"
        console.next_command(f"{command} --resume")
        raise SystemExit(128 + stop.signum) from None
    finally:
        leave(together)


def _print_json(result: Finetuned) -> None:
    from mpoc.reporting.summary import to_json

    report = {"schema": "mpoc.training/1", "written": str(result.output), **result.training}
    report["examples_per_second"] = round(result.rate, 2)
    sys.stdout.write(to_json(report) + "\n")


def _print_lines(result: Finetuned, console: Output) -> None:
    from mpoc.reporting.remarks import scores_line, training_lines

    training = result.training
    for title in ("start", "final", "test"):
        if title in training:
            split = "" if title == "test" else f"{training['split']}, "
            console.result.print(f"{split}{title}: {scores_line(training[title])}", soft_wrap=True)
    earlier = {name: value for name, value in training.items() if name != "earlier"}
    console.result.print(training_lines(earlier)[-1], soft_wrap=True)
