"""``mpoc compress``: from a checkpoint to a compressed one and its ρ report.

The command line becomes a request, which is checked before any work; then one compression, or with
``--max-drop`` a search for the smallest; then a table or JSON, with scores before and after where asked for.
Without a goal nothing is written, and the table says what the network keeps at several sizes.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.compression.recipe import GOALS, LayerRule, Recipe, make_recipe
from mpoc.compression.recipe_syntax import read_recipe
from mpoc.errors import MpocError, UsageError, command_line
from mpoc.runtime.options import ADVANCED, COMMON, argument, nested, option
from mpoc.runtime.signals import Terminated, removed_on_exit
from mpoc.train.settings import DataOptions, EvaluationRequest, architecture_option

if TYPE_CHECKING:
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest
    from mpoc.compression.search import Bisection
    from mpoc.compression.size_table import SizeRow
    from mpoc.compression.write import Compression
    from mpoc.train.evaluate_file import FileEvaluation

NONE = "none"  # of --calibrate
_OF_CALIBRATION = ("calibration_samples", "refine", "moments", "scratch")


@dataclass(frozen=True)
class CompressOptions:
    """The command line of ``mpoc compress``."""

    model: Path = argument(
        "MODEL", "Checkpoint: .pt .pth .th .bin .ckpt .safetensors, or a Hugging Face directory."
    )
    options: dict[str, Any] = nested(Recipe, make=dict)  # those given, by the names of fields
    output: Path | None = option(
        "Write here.",
        None, "--output -o", metavar="OUT", panel=COMMON, shown="MODEL.mpo.safetensors or MODEL-mpo/",
    )  # fmt: skip
    calibrate: str | None = option(
        "Fit what layers do on inputs: yours, self or none.",
        None, metavar="DATA|self|none", panel=COMMON, shown="self for budgets",
    )  # fmt: skip
    arch: str | None = architecture_option()
    dry_run: bool = option("Print the plan and write no output.", False, panel=COMMON)
    force: bool = option("Replace an existing output.", False, panel=COMMON)
    calibration_samples: int | None = option(
        "Use at most this many examples of --calibrate.", None, panel=ADVANCED, shown="512"
    )
    refine: bool = option("Train each block's layers together; needs --calibrate.", False, panel=ADVANCED)
    moments: Path | None = option(
        "Keep the dense network's statistics in this file; needs --calibrate.",
        None, metavar="FILE", panel=ADVANCED,
    )  # fmt: skip
    scratch: Path | None = option(
        "Folder for what calibration need not hold in memory; needs --calibrate.",
        None, metavar="DIR", panel=ADVANCED, shown="beside OUT",
    )  # fmt: skip
    eval_data: Path | None = option(
        "Measure before and after on these data, as mpoc eval does.",
        None, "--eval", metavar="DATA", panel=ADVANCED,
    )  # fmt: skip
    plot: Path | None = option(
        "Draw sizes, without a goal or with --max-drop: .png, .svg or .pdf.",
        None, metavar="FILE", panel=ADVANCED,
    )  # fmt: skip
    recipe: Path | None = option(
        "Read options, and tables for single layers, from a TOML file.", None, metavar="FILE", panel=ADVANCED
    )
    resume: bool = option("Keep finished layers in OUT.partial, and resume from them.", False, panel=ADVANCED)
    as_json: bool = option("Print the report as JSON on stdout.", False, "--json", panel=ADVANCED)
    quiet: bool = option("Print no progress.", False, panel=ADVANCED)
    verbose: bool = option("Name every unchanged weight, with the reason.", False, panel=ADVANCED)


@takes(CompressOptions)
def compress(options: CompressOptions) -> None:
    """Compress a checkpoint: store weights in few bits, or replace them by tensor networks.

    --arch file.py:function runs that code. Data formats and forms: mpoc guide.

    Without a goal nothing is written: a table says what is kept at several sizes.

    Examples:

    mpoc compress fc2.pt

    mpoc compress fc2.pt --size 25% -o quarter.safetensors

    mpoc compress fc2.pt --arch fc2 --size 10% --calibrate mnist/ -o tenth.safetensors

    mpoc compress resnet56.th --bond 8

    mpoc compress bert/ --ratio 0.5 --exclude 'pooler*'

    mpoc compress fc2.pt --arch fc2 --ratio 0.5 --calibrate mnist/

    mpoc compress fc2.pt --max-drop 1 --calibrate mnist/ --eval mnist/ -o small.safetensors

    mpoc compress bert/ --bits 4 -o bert-4bit

    mpoc compress vgg.pt --bond 4 --layers 'conv*' --conv map --input-shape 'conv*=2x2'
    """
    console = Output(options.quiet, options.verbose)
    request = compress_request(options)
    if not request.has_goal:
        _tabulate_sizes(request, console)
        return
    with console.never_silent():
        searches = request.recipe.max_drop is not None
        result = _search(request, console) if searches else _compress(request, console)
    for note in result.compression.notes:
        console.say(f"note: {note}")
    if console.silent:
        return
    if options.as_json:
        print_json(result)
    else:
        from mpoc.cli.tables import print_compression

        print_compression(result, console)
    if result.compression.written:
        console.say(f"wrote {result.compression.output}")
        console.next_command(command_line("mpoc", "report", result.compression.output))


@dataclass(frozen=True)
class CompressRequest:
    """A command line that has been read and checked."""

    model: Path
    output: Path
    recipe: Recipe
    calibration: CalibrationRequest | None
    options: CompressOptions
    has_goal: bool = True  # else the recipe's size stands for those of a table


def compress_request(options: CompressOptions) -> CompressRequest:
    """Read the recipe, and check what can be checked before any work.

    Raises:
        UsageError: options that exclude each other, no such data, or an output, plot or file of moments that
            may not be written.
        MpocError: the directory of one of them does not exist, or matplotlib is missing.
    """
    from mpoc.compression.pipeline import default_output, refuse_output
    from mpoc.data.recognise import recognise

    has_goal = _has_goal(options)
    recipe = make_recipe(options.recipe, options.options | ({} if has_goal else {"size": 1.0}))
    output, calibration = options.output or default_output(options.model), _calibration(options, recipe)
    request = CompressRequest(options.model, output, recipe, calibration, options, has_goal)
    _refuse_conflicts(request)
    _refuse_moments(request)
    if options.eval_data is not None:
        refuse_output(request.model, request.output, options.force)
        for data in filter(None, (options.eval_data, _data_of(request))):
            recognise(data, None)
    return request


def _has_goal(options: CompressOptions) -> bool:
    """Whether a size, bits or another goal is given, here or in the recipe.

    Raises:
        UsageError: none is, but an option that makes no sense without.
    """
    values = {} if options.recipe is None else read_recipe(options.recipe, Recipe, LayerRule)[0]
    if any(name in values or name in options.options for name in (*GOALS, "bits")):
        return True
    for name in ("output", "eval_data", "resume", "force", "dry_run", "refine"):
        if getattr(options, name):
            goals = ", ".join(f"--{goal.replace('_', '-')}" for goal in (*GOALS, "bits"))
            raise UsageError(
                f"--{name.removesuffix('_data').replace('_', '-')} requires a goal: one of {goals}",
                "--size 25%",
            )
    return False


def _calibration(options: CompressOptions, recipe: Recipe) -> CalibrationRequest | None:
    """The calibration asked for; by itself on self-made data, where budget and network allow."""
    from mpoc.compression.source import calibrates_itself

    by_itself = options.calibrate is None and calibrates_itself(recipe, options.model, options.arch)
    needing = [name for name in _OF_CALIBRATION if getattr(options, name)]
    if options.calibrate in (None, NONE) and not by_itself:
        if needing:
            raise UsageError(f"--{needing[0].replace('_', '-')} requires --calibrate", "--calibrate DATA")
        return None
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest, named_data
    from mpoc.models.self_made_data import SELF

    request = CalibrationRequest(
        named_data(options.calibrate or SELF),
        refine=options.refine,
        moments=options.moments,
        scratch=options.scratch,
        optional=by_itself and not needing and recipe.effort is None,
    )
    samples = options.calibration_samples
    return request if samples is None else replace(request, samples=samples)


def _data_of(request: CompressRequest) -> Path | None:
    """The data set of ``--calibrate``; None where there is none on disk."""
    data = None if request.calibration is None else request.calibration.data
    return data if isinstance(data, Path) else None


def _refuse_conflicts(request: CompressRequest) -> None:
    options, searches = request.options, request.recipe.max_drop is not None
    if options.dry_run and (searches or options.eval_data is not None):
        name = "--max-drop" if searches else "--eval"
        raise UsageError(f"{name} measures what was written, and --dry-run writes nothing")
    if searches and options.eval_data is None:
        raise UsageError("--max-drop requires data to measure on", "--eval DATA")
    if options.resume and (searches or options.dry_run):
        why = "--max-drop writes several" if searches else "--dry-run fits nothing that could be kept"
        raise UsageError(f"--resume keeps the finished layers of one output, and {why}")
    if options.plot is not None:
        if request.has_goal and not searches:
            raise UsageError("--plot draws the trials of --max-drop, or without a goal a table of sizes")
        from mpoc.reporting.plots import refuse_unknown_picture

        refuse_unknown_picture(options.plot)


def _refuse_moments(request: CompressRequest) -> None:
    """A file to keep moments in must have a place of its own."""
    options, path = request.options, request.options.moments
    if path is None:
        return
    resolved = path.resolve()
    for other in (request.model, request.output, _data_of(request), options.eval_data, options.plot):
        if other is not None and other.resolve() in (resolved, *resolved.parents):
            raise UsageError(f"--moments {path}: is the same as {other}, or inside it", "name another FILE")
    if resolved.exists() and not resolved.is_file():
        raise UsageError(f"--moments {path}: is not a file", "name another FILE")
    folder = resolved.parent
    if not folder.is_dir():
        raise MpocError(
            f"--moments {path}: there is no directory {folder}", command_line("mkdir", "-p", folder)
        )
    if not resolved.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise MpocError(f"--moments {path}: no permission to write in {folder}")


@dataclass(frozen=True)
class CompressResult:
    """A compression, and the scores before and after where they were asked for."""

    compression: Compression
    before: FileEvaluation | None
    after: FileEvaluation | None
    search: Bisection | None = None


def _compress(request: CompressRequest, console: Output) -> CompressResult:
    from mpoc.cli.progress import layer_progress, stage_lines
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.run_context import Progress
    from mpoc.compression.write import record_scores, scores_record

    before = _measure(request.model, request, console)
    _announce(request, console)
    with layer_progress(console) as progress:
        compression = compress_checkpoint(
            request.model,
            request.output,
            request.recipe,
            calibrate=request.calibration,
            arch=request.options.arch,
            force=request.options.force,
            dry_run=request.options.dry_run,
            resume=request.options.resume,
            progress=Progress(progress, stage_lines(console)),
            measured=None if before is None else scores_record(before),
        )
    after = _measure_output(compression, request, console)
    if before is not None and after is not None and not console.silent:
        compression = record_scores(compression, scores_record(before, after))
    return CompressResult(compression, before, after)


def _measure_output(
    compression: Compression, request: CompressRequest, console: Output
) -> FileEvaluation | None:
    """The scores of the output; a signal meanwhile says that it is written."""
    if not compression.written:
        return None
    note = f"{compression.output} is written"
    try:
        with removed_on_exit(None, note):
            return _measure(compression.output, request, console)
    except (KeyboardInterrupt, Terminated) as stop:
        stop.add_note(note)
        raise


def _search(request: CompressRequest, console: Output) -> CompressResult:
    """Find the smallest output; each trial prints a line, and on a terminal a bar while it runs."""
    from mpoc.cli.progress import layer_progress, stage_lines
    from mpoc.cli.tables import goal_line, trial_line
    from mpoc.compression.search import SearchCallbacks, SearchRequest, compress_within

    options = request.options
    assert options.eval_data is not None

    def start(before: FileEvaluation) -> None:
        console.say(goal_line(before, request.recipe.max_drop))
        _announce(request, console)

    callbacks = SearchCallbacks(
        start,
        lambda trial, kept: console.say(trial_line(trial, kept)),
        partial(layer_progress, console) if console.messages.is_terminal else nullcontext,
        stage_lines(console),
    )
    console.say(f"measuring {request.model}")
    data, calibration = DataOptions(options.eval_data), request.calibration
    search = SearchRequest(
        request.model, request.output, request.recipe, data, calibration, options.arch, options.force
    )
    result = compress_within(search, callbacks)
    if options.plot is not None:
        from mpoc.reporting.plots import draw_picture

        draw_picture(options.plot, [result.chart()])
        console.say(f"wrote {options.plot}")
    return CompressResult(result.compression, result.before, result.after, result.search)


def _tabulate_sizes(request: CompressRequest, console: Output) -> None:
    """Print what is kept at several sizes, and draw it where that is asked for; nothing else is written."""
    from mpoc.cli.progress import layer_progress, stage_lines
    from mpoc.cli.tables import print_sizes, size_line
    from mpoc.compression.size_table import TableCallbacks, make_size_table
    from mpoc.reporting.summary import to_json

    callbacks = TableCallbacks(
        lambda row: console.say(size_line(row)),
        partial(layer_progress, console) if console.messages.is_terminal else nullcontext,
        stage_lines(console),
    )
    options = request.options
    with console.never_silent():
        _announce(request, console)
        table = make_size_table(request.model, request.recipe, request.calibration, options.arch, callbacks)
    for note in table.notes:
        console.say(f"note: {note}")
    if options.as_json:
        sys.stdout.write(to_json(table.to_dict(_command)) + "\n")
    elif not console.silent:
        print_sizes(console.result, table, _command)
    if options.plot is not None:
        from mpoc.reporting.plots import draw_picture

        draw_picture(options.plot, [table.chart()])
        console.say(f"wrote {options.plot}")


def _command(row: SizeRow) -> str:
    """The command of a table of sizes, with the size of this row in place of what prints the table."""
    words = [word for word in sys.argv[1:] if word != "--json" and not word.startswith("--plot=")]
    if "--plot" in words:
        place = words.index("--plot")
        del words[place : place + 2]
    return command_line("mpoc", *words, *row.option.split())


def _announce(request: CompressRequest, console: Output) -> None:
    from mpoc.runtime.device import choose_device

    console.say(f"device {choose_device(request.recipe.device)}")
    if request.calibration is not None:
        data = _data_of(request) or "self-made data"
        why = (
            ", as no --calibrate is given (none: weights alone)" if request.options.calibrate is None else ""
        )
        console.say(f"calibrating on {data}{why}: first the dense network, then layer by layer")


def _measure(path: Path, request: CompressRequest, console: Output) -> FileEvaluation | None:
    """The network's scores on the data of ``--eval``."""
    options = request.options
    if options.eval_data is None:
        return None
    from mpoc.train.evaluate_file import evaluate_file

    console.say(f"measuring {path}")
    data, device = DataOptions(options.eval_data), request.recipe.device
    asked = EvaluationRequest(path, data, arch=options.arch, stand_in=request.model, device=device)
    return evaluate_file(asked)


def print_json(result: CompressResult) -> None:
    """The report as JSON on stdout, with scores and trials where there are some."""
    from mpoc.reporting.summary import report_dict, to_json

    compression = result.compression
    report = report_dict(compression.manifest, compression.nbytes, compression.seconds)
    report["written"] = str(compression.output) if compression.written else None
    if result.before is not None and result.after is not None:
        report["evaluation"] = {"before": result.before.as_dict(), "after": result.after.as_dict()}
    if result.search is not None:
        report["search"] = result.search.as_dicts()
    sys.stdout.write(to_json(report) + "\n")
