"""``mpoc eval``: how good a network is, how near to another, how fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpoc.cli.console import Output, reported_errors
from mpoc.cli.data_options import (
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

if TYPE_CHECKING:
    from mpoc.train.evaluate_file import FileEvaluation


_WHAT = "What is measured"


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A compressed file or directory; or a dense checkpoint: a file with --arch, a directory.",
        ),
    ],
    data: DataPath,
    format: Format = None,
    mean: Mean = None,
    std: Std = None,
    size: ImageSize = None,
    tokenizer: Tokenizer = None,
    block: Block = None,
    column: Column = None,
    held_out: HoldOut = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, validation or test. Default: test, else validation, else train.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="The dense network: one of the zoo, as resnet:depth=56, or package.module:factory or "
            "file.py:factory, which is run.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, causal-lm or masked-lm. Default: told from data and network.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL2",
            help="Fidelity to this network instead: cosine of the outputs, KL, agreement. No labels needed.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Seconds of a call too, compressed beside dense, for one example and for --batch.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    batch: Annotated[int, typer.Option(help="Examples at a time.", rich_help_panel=_WHAT)] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_WHAT)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The measures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Results and errors only.")] = False,
) -> None:
    """Measure a network, dense or compressed, on a data set: accuracy, loss, perplexity, or fidelity.

    --arch runs the code that it names.

    Examples:

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --reference dense.pt --json

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --latency --batch 16
    """
    values = dict(locals())
    with reported_errors():
        from mpoc.reporting.summary import to_json
        from mpoc.train.evaluate_file import EvaluationRequest, evaluate_file

        words = Output(quiet)
        request = EvaluationRequest(
            model,
            data_options(data, values),
            split,
            arch,
            task,
            reference,
            latency=latency,
            batch=batch,
            device=device,
        )
        found = evaluate_file(request, words.say)
        if as_json:
            sys.stdout.write(to_json(found.as_dict()) + "\n")
        else:
            _print_lines(found, words)


def _print_lines(found: FileEvaluation, words: Output) -> None:
    from mpoc.cli.tables import scores_line

    words.result.print(f"{found.split}: {scores_line(found.scores)}", soft_wrap=True)
    words.result.print(f"{found.examples:,} examples, {found.rate:,.0f} a second", soft_wrap=True)
    for line in found.latencies:
        words.result.print(_latency_line(line), soft_wrap=True)


def _latency_line(line: dict[str, Any]) -> str:
    name = "compressed" if "dense_ms" in line else "dense"
    text = f"batch {line['batch']}: {name} {line['ms']:.3g} ms"
    if "dense_ms" in line:
        text += f", dense {line['dense_ms']:.3g} ms ({line['dense_ms'] / line['ms']:.2f} × as fast)"
    return text
