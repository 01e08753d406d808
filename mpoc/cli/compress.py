"""The command line of ``mpoc compress`` as plain data, checked before any work.

What ``mpoc compress`` prints: the table or JSON, scores before and after, and the trials of a search.

What ``mpoc compress`` does with a request: one compression, or a search for the smallest.

``mpoc compress``: a checkpoint in, cores and a ρ report out.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from mpoc.cli.compress_options import (
    HOW,
    OUT,
    AllowGrowth,
    Arch,
    Bond,
    Calibrate,
    CalibrationSamples,
    Conv,
    Discard,
    Embeddings,
    EvalData,
    Exclude,
    Form,
    InputShapes,
    Layers,
    MaxDrop,
    MaxError,
    MinParams,
    Moments,
    Orders,
    Plot,
    Ratio,
    Refine,
    Resume,
    Shape,
    Sites,
    Size,
)
from mpoc.cli.console import Output, reported_errors
from mpoc.cli.progress import layer_progress, stage_lines
from mpoc.cli.tables import print_report, scores_line
from mpoc.errors import MpocError, UsageError
from mpoc.reporting.summary import report_dict, to_json
from mpoc.runtime.formatting import human_bytes

if TYPE_CHECKING:
    from mpoc.compression.calibrate.statistics import CalibrationRequest
    from mpoc.compression.recipe import Recipe
    from mpoc.compression.search import Bisection, SearchResult, Trial
    from mpoc.compression.write import Compression
    from mpoc.reporting.plots import SizeTrials
    from mpoc.train.evaluate_file import FileEvaluation


_UNITS = {"accuracy": " (%)", "agreement": " (%)"}


@dataclass(frozen=True)
class CompressRequest:
    """What is asked for."""

    model: Path
    output: Path
    recipe: Recipe
    force: bool
    dry_run: bool
    arch: str | None
    calibration: CalibrationRequest | None
    eval_data: Path | None
    plot: Path | None
    resume: bool


def compress_request(values: dict[str, Any]) -> CompressRequest:
    """The options of ``mpoc compress`` as plain data.

    Args:
        values: by the names of the command's parameters.

    Raises:
        UsageError: a value that cannot be read, options that do not go together, no such data, or an output,
            picture or file of moments that may not be written.
        MpocError: the directory of one of them is not there, or matplotlib is not.
    """
    from mpoc.compression.pipeline import default_output, refuse_output

    request = CompressRequest(
        values["model"],
        values["output"] or default_output(values["model"]),
        _recipe(values),
        values["force"],
        values["dry_run"],
        values["arch"],
        _calibration(values),
        values["eval_data"],
        values["plot"],
        values["resume"],
    )
    _refuse_what_does_not_go_together(request)
    _refuse_moments(request)
    if request.eval_data is not None:
        refuse_output(request.model, request.output, request.force)
        _refuse_missing(request.eval_data)
        if request.calibration is not None:
            _refuse_missing(request.calibration.data)
    return request


def _recipe(values: dict[str, Any]) -> Recipe:
    from mpoc.compression.recipe import make_recipe

    return make_recipe(values["recipe"], recipe_options(values))


def recipe_options(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's parameters that are fields of a recipe, read.

    Raises:
        UsageError: a shape or a size that is none.
    """
    from mpoc.compression.recipe import Recipe
    from mpoc.compression.recipe_syntax import parse_input_shape, parse_shape, parse_size
    from mpoc.tensor_networks.factors import parse_order

    options = {f.name: values[f.name] for f in fields(Recipe) if f.name in values}
    readers = {"shape": parse_shape, "input_shape": parse_input_shape, "order": parse_order}
    for key, value in options.items():
        if isinstance(value, list):
            options[key] = tuple(map(readers[key], value)) if key in readers else tuple(value)
        elif key in ("size", "max_shard_size") and value is not None:
            options[key] = parse_size(value)
    return options


def _calibration(values: dict[str, Any]) -> CalibrationRequest | None:
    if values["calibrate"] is None:
        for name in ("calibration_samples", "refine", "moments"):
            if values[name]:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} is of use with --calibrate only", "--calibrate DATA")
        return None
    from mpoc.compression.calibrate.statistics import CalibrationRequest

    request = CalibrationRequest(values["calibrate"], refine=values["refine"], moments=values["moments"])
    samples = values["calibration_samples"]
    return request if samples is None else replace(request, samples=samples)


def _refuse_what_does_not_go_together(request: CompressRequest) -> None:
    searches = request.recipe.max_drop is not None
    if request.dry_run and (searches or request.eval_data is not None):
        option = "--max-drop" if searches else "--eval"
        raise UsageError(f"{option} measures what was written, and --dry-run writes nothing")
    if searches and request.eval_data is None:
        raise UsageError("--max-drop is of a metric, so it needs data to measure it on", "--eval DATA")
    if request.resume and (searches or request.dry_run):
        why = "--max-drop writes several" if searches else "--dry-run fits nothing that could be kept"
        raise UsageError(f"--resume keeps the finished layers of one output, and {why}")
    if request.plot is not None:
        if not searches:
            raise UsageError("--plot draws what --max-drop finds, and it is not given", "--max-drop 1")
        from mpoc.reporting.plots import refuse_unknown_picture

        refuse_unknown_picture(request.plot)


def _refuse_moments(request: CompressRequest) -> None:
    """A file to keep moments in must have a place of its own."""
    path = None if request.calibration is None else request.calibration.moments
    if request.calibration is None or path is None:
        return
    here = path.resolve()
    for other in (request.model, request.output, request.calibration.data, request.eval_data, request.plot):
        if other is not None and other.resolve() in (here, *here.parents):
            raise UsageError(f"--moments {path}: is in the place of {other}, or in it", "name another FILE")
    if here.exists() and not here.is_file():
        raise UsageError(f"--moments {path}: is not a file", "name another FILE")
    if not here.parent.is_dir():
        raise MpocError(f"--moments {path}: there is no directory {here.parent}", f"mkdir -p {here.parent}")
    if not here.exists() and not os.access(here.parent, os.W_OK | os.X_OK):
        raise MpocError(f"--moments {path}: no permission to write in {here.parent}")


def _refuse_missing(data: Path) -> None:
    from mpoc.data.recognise import recognise

    recognise(data, None)


@dataclass(frozen=True)
class Compressed:
    """What was done, and measured."""

    done: Compression
    before: FileEvaluation | None  # None: not asked for
    after: FileEvaluation | None
    search: Bisection | None = None


def print_json(found: Compressed) -> None:
    """The report as JSON on stdout, with scores and trials where there are some."""
    done = found.done
    report = report_dict(done.manifest, done.nbytes, done.seconds)
    report["written"] = str(done.output) if done.written else None
    if found.before is not None and found.after is not None:
        report["evaluation"] = {"before": found.before.as_dict(), "after": found.after.as_dict()}
    if found.search is not None:
        report["search"] = [_trial_dict(trial, found.search) for trial in found.search.trials]
    sys.stdout.write(to_json(report) + "\n")


def _trial_dict(trial: Trial, search: Bisection) -> dict[str, Any]:
    return {
        "ratio": trial.ratio,
        "nbytes": trial.nbytes,
        "scores": {name: _number(score) for name, score in trial.scores.items()},
        "drop": _number(trial.drop),
        "kept": search.keeps(trial),
        "chosen": trial is search.chosen,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def print_table(found: Compressed, words: Output) -> None:
    """The trials, the table, the totals, and the scores."""
    done = found.done
    if found.search is not None and found.before is not None:
        nbytes = done.manifest.source.nbytes
        words.result.print(goal_line(found.before, found.search.max_drop), soft_wrap=True)
        words.result.print(_trials(found.search, found.before, nbytes))
        words.result.print()
    seconds = done.seconds or None
    print_report(words.result, done.manifest, done.nbytes, seconds, not done.written, words.verbose)
    for title, measured in (("before", found.before), ("after", found.after)):
        if measured is not None:
            line = (
                f"{title}: {scores_line(measured.scores)} ({measured.split}, {measured.examples:,} examples)"
            )
            words.result.print(line, soft_wrap=True)


def _trials(search: Bisection, before: FileEvaluation, nbytes: int | None) -> Table:
    """By size, the dense network last."""
    metric = before.metric
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("on disk", "--ratio", metric, "drop"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for trial in sorted(search.trials, key=lambda trial: trial.nbytes):
        is_chosen = trial is search.chosen
        said = "chosen" if is_chosen else "" if search.keeps(trial) else "loses too much"
        table.add_row(
            human_bytes(trial.nbytes),
            f"{trial.ratio:.3f}",
            _value(metric, trial.scores[metric]),
            f"{trial.drop:.4g}",
            said,
            style="bold" if is_chosen else None,
        )
    size = "" if nbytes is None else human_bytes(nbytes)
    table.add_row(size, "", _value(metric, before.scores[metric]), "", "dense", style="dim")
    return table


def _value(metric: str, value: float) -> str:
    return scores_line({metric: value}).removeprefix(metric.replace("_", " ")).strip()


def goal_line(before: FileEvaluation, max_drop: float | None) -> str:
    """What is measured on what, and how far it may go."""
    like = "" if before.reference is None else " with the original (no labels or no head: likeness)"
    value = scores_line({before.metric: before.scores[before.metric]})
    way = "fall" if before.higher_is_better else "rise"
    where = f"{before.data} ({before.split}, {before.examples:,} examples)"
    return f"{value}{like} on {where}; it may {way} by {max_drop:g}"


def trial_line(trial: Trial, kept: bool) -> str:
    """One trial."""
    found = f"{human_bytes(trial.nbytes)}, {scores_line(dict(trial.scores))}"
    return f"ρ {trial.ratio:.3f}: {found}; drop {trial.drop:.4g}, {'kept' if kept else 'too much'}"


def run(request: CompressRequest, words: Output) -> Compressed:
    """Do it, in words on stderr.

    Raises:
        MpocError: as :func:`mpoc.compression.pipeline.compress_checkpoint` and
        :func:`mpoc.compression.search.compress_within`.
    """
    done = _once(request, words) if request.recipe.max_drop is None else _search(request, words)
    for note in done.done.notes:
        words.say(f"note: {note}")
    return done


def _once(request: CompressRequest, words: Output) -> Compressed:
    from mpoc.compression.pipeline import compress_checkpoint

    before = _measure(request.model, request, words)
    _say_what_begins(request, words)
    with layer_progress(words) as progress:
        done = compress_checkpoint(
            request.model,
            request.output,
            request.recipe,
            request.force,
            request.dry_run,
            progress,
            request.arch,
            request.calibration,
            stage_lines(words),
            request.resume,
        )
    return Compressed(done, before, _measure(done.output, request, words))


def _search(request: CompressRequest, words: Output) -> Compressed:
    """Tries are told a line each; of their layers there is a bar on a terminal, and nothing elsewhere."""
    from mpoc.compression.search import SearchCallbacks, compress_within
    from mpoc.train.training_data import DataOptions

    assert request.eval_data is not None

    def start(before: FileEvaluation) -> None:
        words.say(goal_line(before, request.recipe.max_drop))
        _say_what_begins(request, words)

    watch = SearchCallbacks(
        start,
        lambda trial, kept: words.say(trial_line(trial, kept)),
        partial(layer_progress, words) if words.words.is_terminal else nullcontext,
        stage_lines(words),
    )
    words.say(f"measuring {request.model}")
    found = compress_within(
        request.model,
        request.output,
        request.recipe,
        DataOptions(request.eval_data),
        request.force,
        request.arch,
        request.calibration,
        watch,
    )
    if request.plot is not None:
        from mpoc.reporting.plots import draw_size_trials

        draw_size_trials(_size_trials(found), request.plot)
        words.say(f"wrote {request.plot}")
    return Compressed(found.done, found.before, found.after, found.search)


def _size_trials(found: SearchResult) -> SizeTrials:
    """The trials of a search as the picture takes them."""
    from mpoc.reporting.plots import SizeTrials

    search, before, metric = found.search, found.before, found.before.metric
    chosen = search.chosen
    assert chosen is not None
    sign = -1 if before.higher_is_better else 1
    return SizeTrials(
        sorted((trial.nbytes, trial.scores[metric]) for trial in search.trials),
        (chosen.nbytes, chosen.scores[metric]),
        f"chosen: --ratio {chosen.ratio:g}",
        (found.done.manifest.source.nbytes, before.scores[metric]),
        before.scores[metric] + sign * search.max_drop,
        f"dense {'−+'[sign > 0]} {search.max_drop:g}",
        f"{metric} on {before.data}, {before.split}{_UNITS.get(metric, '')}",
    )


def _say_what_begins(request: CompressRequest, words: Output) -> None:
    from mpoc.runtime.device import choose_device

    words.say(f"device {choose_device(request.recipe.device)}")
    if request.calibration is not None:
        data = request.calibration.data
        words.say(f"calibrating on {data}: first the dense network, then layer by layer")


def _measure(path: Path, request: CompressRequest, words: Output) -> FileEvaluation | None:
    """The network's scores on the data of ``--eval``."""
    if request.eval_data is None:
        return None
    from mpoc.train.evaluate_file import EvaluationRequest, evaluate_file
    from mpoc.train.training_data import DataOptions

    words.say(f"measuring {path}")
    return evaluate_file(
        EvaluationRequest(
            path,
            DataOptions(request.eval_data),
            arch=request.arch,
            stand_in=request.model,
            device=request.recipe.device,
        )
    )


def compress(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint: .pt .pth .th .bin .ckpt .safetensors, or a Hugging Face directory.",
        ),
    ],
    bond: Bond = None,
    ratio: Ratio = None,
    max_error: MaxError = None,
    discard: Discard = None,
    size: Size = None,
    max_drop: MaxDrop = None,
    layers: Layers = None,
    exclude: Exclude = None,
    embeddings: Embeddings = None,
    min_params: MinParams = None,
    allow_growth: AllowGrowth = None,
    form: Form = None,
    sites: Sites = None,
    shape: Shape = None,
    order: Orders = None,
    conv: Conv = None,
    input_shape: InputShapes = None,
    arch: Arch = None,
    eval_data: EvalData = None,
    plot: Plot = None,
    calibrate: Calibrate = None,
    calibration_samples: CalibrationSamples = None,
    refine: Refine = False,
    moments: Moments = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file: these options, and tables for single layers.",
            rich_help_panel=HOW,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the stored cores: float32, bfloat16, … Default: each weight's own.",
            rich_help_panel=HOW,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the randomised SVD.", rich_help_panel=HOW)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Default: MODEL.mpo.safetensors or MODEL-mpo/ in the current directory.",
            rich_help_panel=OUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel=OUT)
    ] = False,
    resume: Resume = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest weight file of a directory. Default: 5GB.", rich_help_panel=OUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, write no output.", rich_help_panel=OUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The report as JSON on stdout.", rich_help_panel=OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=OUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Name every weight left alone, with the reason.", rich_help_panel=OUT),
    ] = False,
) -> None:
    """Compress a checkpoint: each chosen linear map becomes a matrix product operator.

    Examples:

    mpoc compress resnet56.th --bond 8

    mpoc compress bert/ --ratio 0.5 --exclude 'pooler*'

    mpoc compress fc2.pt --arch fc2 --ratio 0.5 --calibrate mnist/

    mpoc compress fc2.pt --arch fc2 --max-drop 1 --eval mnist/ -o small.safetensors

    mpoc compress vgg.pt --size 20MB --dry-run

    mpoc compress vgg.pt --bond 4 --layers 'conv*' --conv map --input-shape 'conv*=2x2'
    """
    values = dict(locals())

    with reported_errors():
        words = Output(quiet, verbose)
        request = compress_request(values)
        found = run(request, words)
        if words.silent:
            return
        if as_json:
            print_json(found)
        else:
            print_table(found, words)
        if found.done.written:
            words.say(f"wrote {found.done.output}")
            words.next_command(f"mpoc report {found.done.output}")
