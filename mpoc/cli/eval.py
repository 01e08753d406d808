"""``mpoc eval``: measure accuracy, loss, perplexity, similarity to another network, or latency."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpoc.cli.console import Output, plain
from mpoc.cli.options import takes
from mpoc.runtime.options import ADVANCED, nested, option
from mpoc.train.settings import EvaluationRequest

if TYPE_CHECKING:
    from mpoc.train.evaluate_file import FileEvaluation


@dataclass(frozen=True)
class EvalOptions:
    """The command line of ``mpoc eval``."""

    request: EvaluationRequest = nested(EvaluationRequest)
    as_json: bool = option("Print the scores as JSON on stdout.", False, "--json", panel=ADVANCED)
    quiet: bool = option("Print results and errors only.", False, panel=ADVANCED)


@takes(EvalOptions)
def evaluate(options: EvalOptions) -> None:
    """Measure a network, dense or compressed, on a data set: accuracy, loss, perplexity, or fidelity.

    --arch file.py:function runs that code. Data formats: mpoc guide.

    Examples:

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --reference dense.pt --json

    mpoc eval resnet56.mpo.safetensors --arch resnet.py:resnet56 --data cifar10/ --latency --batch 16
    """
    from mpoc.reporting.summary import to_json
    from mpoc.train.evaluate_file import evaluate_file

    console = Output(options.quiet)
    evaluation = evaluate_file(options.request, console.say)
    if options.as_json:
        sys.stdout.write(to_json(evaluation.as_dict()) + "\n")
    else:
        _print_lines(evaluation, console)


def _print_lines(evaluation: FileEvaluation, console: Output) -> None:
    from mpoc.reporting.remarks import scores_line

    console.result.print(plain(f"{evaluation.split}: {scores_line(evaluation.scores)}"), soft_wrap=True)
    console.result.print(f"{evaluation.examples:,} examples, {evaluation.rate:,.0f} a second", soft_wrap=True)
    for line in evaluation.latencies:
        console.result.print(_latency_line(line), soft_wrap=True)


def _latency_line(line: dict[str, Any]) -> str:
    name = "compressed" if "dense_ms" in line else "dense"
    text = f"batch {line['batch']}: {name} {line['ms']:.3g} ms"
    if "dense_ms" in line:
        text += f", dense {line['dense_ms']:.3g} ms ({line['dense_ms'] / line['ms']:.2f} × as fast)"
    return text
