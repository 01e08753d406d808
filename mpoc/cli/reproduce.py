"""``mpoc reproduce``: the papers' experiments, the paper's numbers beside ours.

Most studies train networks; ``mps-images`` compresses images and trains nothing.
"""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.cli.console import Output, plain
from mpoc.cli.options import takes
from mpoc.errors import UsageError, shortened
from mpoc.runtime.options import ADVANCED, COMMON, argument, option
from mpoc.train.settings import DEVICE_HELP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.table import Table

    from mpoc.reproduce.all_tables import PlannedTable
    from mpoc.reproduce.image_states import ImageStates, ImageStatesRequest
    from mpoc.reproduce.study import Reproduction, StudyRequest
    from mpoc.train.monitor import TrainingEvent


_NETWORKS, _TRAINING = "Networks", "Training"
_IMAGES, _ALL = "mps-images", "all"
# Options that mps-images takes, by the names of fields.
_FOR_IMAGES = {"name", "data", "format", "bonds", "seed", "quick", "output", "plot", "as_json", "quiet"}
_FOR_ALL = {"name", "data", "budget", "only", "seed", "device", "precision", "output", "quiet"}


def _items(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _bonds(text: str) -> tuple[int, ...]:
    for item in _items(text):
        if not item.isdecimal() or len(item) > 15:
            raise UsageError(f"{shortened(item)} is not a whole number", "--bonds 2,4,8")
    return tuple(map(int, _items(text)))


@dataclass(frozen=True)
class ReproduceOptions:
    """The command line of ``mpoc reproduce``."""

    name: str = argument(
        "NAME",
        "all, fc2, lenet5, vgg16, vgg19, resnet, resnet-narrow, densenet, mera, harada, picogpt or "
        "mps-images.",
    )
    data: Path = option("Read this file or folder of examples.", metavar="PATH", panel=COMMON)
    format: str | None = option("Name the format where it is not recognised.", None, panel=ADVANCED)
    held_out: float | None = option(
        "Choose weights on this share of training data.",
        None, "--hold-out", panel=_TRAINING, shown="0; 0.1 for mera",
    )  # fmt: skip
    variants: tuple[str, ...] = option(
        "Choose variants: see above.",
        (), metavar="V[,V…]", panel=_NETWORKS, parse=_items, shown="the first; all of harada and mera",
    )  # fmt: skip
    depth: tuple[str, ...] = option(
        "Choose depths of resnet and resnet-narrow: 20, 32, 44, 56, 110.",
        (),
        metavar="L[,L…]",
        panel=_NETWORKS,
        parse=_items,
    )
    bonds: tuple[int, ...] = option(
        "Use these bond dimensions.",
        (), metavar="D[,D…]", panel=_NETWORKS, parse=_bonds, shown="the paper's",
    )  # fmt: skip
    starts: tuple[str, ...] | None = option(
        "Choose how cores start: ttsvd, rescaled or random.",
        None, metavar="S[,S]", panel=_NETWORKS, parse=_items, shown="ttsvd,random; for VGGs all",
    )  # fmt: skip
    shape: tuple[str, ...] = option(
        "Add another factoring of a layer, as fc1=28x28:16x16. Repeatable.",
        (), metavar="LAYER=INPUTS:OUTPUTS", panel=_NETWORKS, repeated=True,
    )  # fmt: skip
    epochs: float | None = option(
        "Train each network this long.", None, panel=_TRAINING, shown="the recipe's"
    )
    steps: int | None = option("Train for this many steps instead of epochs.", None, panel=_TRAINING)
    paper: bool = option("Train as long as the paper.", False, panel=_TRAINING)
    precision: str = option("Compute in fp32 or bf16.", "fp32", panel=_TRAINING)
    budget: str | None = option(
        "Choose epochs so that all tables fit this time, as 8h.", None, metavar="TIME", panel=_TRAINING
    )
    only: tuple[str, ...] = option(
        "Make only these tables of all.",
        (), metavar="NAME[,NAME…]", panel=_NETWORKS, parse=_items, shown="every table",
    )  # fmt: skip
    control: bool = option(
        "Train dense and TT-SVD together as long as each other network.",
        False, panel=_TRAINING,
    )  # fmt: skip
    no_l2: bool = option("Leave out the second term of Eq. (7).", False, panel=_TRAINING)
    runs: int = option("Number of seeds of every network, for mean ± σ.", 1, panel=_TRAINING)
    seed: int = option("Set the first seed.", 0, panel=_TRAINING)
    quick: bool = option("Try it: ten steps on a part of the data.", False, panel=COMMON)
    device: str = option(DEVICE_HELP, "auto", panel=ADVANCED)
    output: Path | None = option(
        "Keep finished networks here, and use them again.",
        None, "--output -o", metavar="DIR", panel=COMMON, shown="reproduce-NAME/",
    )  # fmt: skip
    plot: Path | None = option(
        "Draw the paper's figure and the curves here.", None, metavar="DIR", panel=COMMON
    )
    as_json: bool = option("Print the table as JSON on stdout.", False, "--json", panel=ADVANCED)
    quiet: bool = option("Print results and errors only.", False, panel=ADVANCED)


@takes(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> None:
    """Repeat an experiment of a paper: dense, MPO-Net from TT-SVD, MPO-Net from random cores.

    Every network gets the same training. With --control the dense network takes two thirds of it, cores
    that start from it the last third, and random cores, and a second dense network, take all. The start
    "rescaled" is TT-SVD with the norms of the dense weights. An interrupted command, given again, resumes
    where it stopped.

    "all" makes every table within --budget, from a folder with mnist/, cifar10/ and text/; those of VGGs,
    ResNets and DenseNets with --control.

    Variants of resnet and resnet-narrow (k = 1) are depths, 56-resunit with the last ResUnit; of densenet
    (n, m, k) as 16-12-24, or convolution; of harada raster or morton, and morton-random-0.1 with automatic
    bonds; of mera fc-1, fc-2, fc-2-printed, mera, tt and mera-channels; all names every one.

    Examples:

    mpoc reproduce fc2 --data mnist/ --quick --plot figures/

    mpoc reproduce mps-images --data mnist/ --quick

    mpoc reproduce fc2 --data mnist/ --epochs 1 --bonds 4,16 --shape 'fc1=28x28:16x16' --json
    """
    console = Output(options.quiet)
    if options.name == _IMAGES:
        _run_images(options, console)
        return
    if options.name == _ALL:
        _run_all(options, console)
        return
    _refuse(options, {"budget", "only"}, "an option of mpoc reproduce all")
    result = _run(_request(options), options.plot, console)
    if options.as_json:
        from mpoc.reporting.summary import to_json

        sys.stdout.write(to_json(result.as_dict()) + "\n")
    else:
        from mpoc.cli.tables import print_reproduction

        print_reproduction(console.result, result)


def _request(options: ReproduceOptions) -> StudyRequest:
    from mpoc.compression.recipe_syntax import parse_shape
    from mpoc.reproduce.catalogue import StudyChoice, find_study
    from mpoc.reproduce.study import StudyRequest

    study = find_study(options.name)
    if options.depth and (study.axis != "depth" or options.variants):
        raise UsageError("--depth chooses variants of resnet or resnet-narrow, and excludes --variants")
    variants = options.depth or options.variants
    shapes = []
    for text in options.shape:
        rule = parse_shape(text)
        if rule.pattern is None:
            raise UsageError(f"--shape {text}: names no layer", "--shape 'fc1=28x28:16x16'")
        shapes.append((text, {rule.pattern: (rule.output_factors, rule.input_factors)}))
    choice = StudyChoice(
        tuple(study.variants) if variants == ("all",) else variants,
        options.bonds, tuple(shapes), options.paper, options.epochs, options.steps, not options.no_l2,
        precision=options.precision, control=options.control,
    )  # fmt: skip
    same = ("name", "data", "runs", "seed", "quick", "format", "device", "starts")
    return StudyRequest(
        **{name: getattr(options, name) for name in same},
        held_out=study.held_out if options.held_out is None else options.held_out,
        output=options.output or Path(f"reproduce-{study.name}"),
        choice=choice,
    )


def _run(request: StudyRequest, plot: Path | None, console: Output) -> Reproduction:
    """Train, write the report beside the networks, and draw."""
    from mpoc.io.atomic import write_text
    from mpoc.reporting.plots import require_matplotlib
    from mpoc.reporting.summary import to_json
    from mpoc.reproduce.figures import draw_figures
    from mpoc.reproduce.study import run_study

    if plot is not None:
        require_matplotlib()
    with _resumable(request.output, console), _live_progress(console) as progress:
        result = run_study(request, console.say, progress)
    report = request.output / "report.json"
    write_text(report, to_json(result.as_dict()) + "\n")
    written = [report, *(draw_figures(result, plot) if plot is not None else ())]
    console.say(f"wrote {', '.join(map(str, written))}")
    return result


@contextmanager
def _resumable(output: Path, console: Output) -> Iterator[None]:
    """Tell how to go on where the user stops what runs in here."""
    from mpoc.runtime.signals import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        console.say(f"stopped; finished networks are in {output}")
        console.next_command(f"mpoc {shlex.join(sys.argv[1:])}")
        raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None


def _run_all(options: ReproduceOptions, console: Output) -> None:
    """Print the plan; train table by table, and after each print it and write the page."""
    from mpoc.cli.tables import print_reproduction
    from mpoc.reproduce.all_tables import AllTablesRequest, parse_budget, plan_tables, run_tables
    from mpoc.reproduce.figures import write_page
    from mpoc.reproduce.study import Reproduction

    allowed = {each.name for each in fields(options)} - _FOR_ALL
    _refuse(options, allowed, "not an option of mpoc reproduce all")
    if options.budget is None:
        raise UsageError("all needs a --budget of time", "--budget 8h")
    output = options.output or Path("reproduce-all")
    same = {name: getattr(options, name) for name in ("data", "only", "device", "seed", "precision")}
    request = AllTablesRequest(**same, output=output, budget=parse_budget(options.budget))
    with _resumable(output, console):
        plan = plan_tables(request, console.say)
        console.result.print(_plan_table(plan))
        results: list[Reproduction | ImageStates] = []
        page = output / "index.html"
        with _live_progress(console) as progress:
            for result in run_tables(request, plan, console.say, progress):
                results.append(result)
                write_page(page, plan, results)
                console.result.print()
                if isinstance(result, Reproduction):
                    print_reproduction(console.result, result)
                else:
                    print_images(console.result, result)
    console.say(f"wrote {page}")


def _plan_table(plan: list[PlannedTable]) -> Table:
    from rich import box
    from rich.table import Table

    from mpoc.reproduce.all_tables import PLAN_COLUMNS, plan_rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in PLAN_COLUMNS:
        table.add_column(title, overflow="fold")
    for row in plan_rows(plan):
        table.add_row(*map(plain, row))
    return table


def _refuse(options: ReproduceOptions, names: set[str], reason: str) -> None:
    """Raise UsageError where one of these fields is not as by default."""
    for each in fields(options):
        if each.name in names and getattr(options, each.name) != each.default:
            name = each.metadata["option"].flags or (f"--{each.name.replace('_', '-')}",)
            raise UsageError(f"{name[0]} is {reason}", "omit it")


@contextmanager
def _live_progress(console: Output) -> Iterator[Callable[[TrainingEvent], None] | None]:
    """The callback of a bar on a terminal; None elsewhere, where finished networks are lines."""
    from mpoc.cli.progress import training_progress

    if not console.messages.is_terminal:
        yield None
        return
    with training_progress(console) as progress:
        yield progress


def _run_images(options: ReproduceOptions, console: Output) -> None:
    """Measure, write the report, draw, and print."""
    from mpoc.io.atomic import write_text
    from mpoc.reporting.plots import require_matplotlib
    from mpoc.reporting.summary import to_json
    from mpoc.reproduce.figures import draw_image_figures
    from mpoc.reproduce.image_states import measure_images

    request, plot = _images_request(options), options.plot
    if plot is not None:
        require_matplotlib()
    result = measure_images(request, console.say)
    output = options.output or Path(f"reproduce-{_IMAGES}")
    output.mkdir(parents=True, exist_ok=True)
    text, report = to_json(result.as_dict()) + "\n", output / "report.json"
    write_text(report, text)
    written = [report, *(draw_image_figures(result, plot) if plot is not None else ())]
    console.say(f"wrote {', '.join(map(str, written))}")
    if options.as_json:
        sys.stdout.write(text)
    else:
        print_images(console.result, result)


def _images_request(options: ReproduceOptions) -> ImageStatesRequest:
    """The request of a study that trains nothing; the study's own bonds where none are given.

    Raises:
        UsageError: an option of studies that train.
    """
    from mpoc.reproduce.image_states import BONDS, ImageStatesRequest

    others = {each.name for each in fields(options)} - _FOR_IMAGES
    _refuse(options, others, "an option of studies that train networks")
    same = {name: getattr(options, name) for name in ("data", "seed", "quick", "format")}
    return ImageStatesRequest(bonds=options.bonds or BONDS, **same)


def print_images(console: Console, result: ImageStates) -> None:
    """Print the table, the entropies, and how the numbers are made."""
    from mpoc.reproduce.figures import image_notes

    if result.quick:
        console.print(f"--quick: {len(result.images)} images", soft_wrap=True)
    console.print(_table(result))
    for line in image_notes(result):
        console.print(plain(line), soft_wrap=True)


def _table(result: ImageStates) -> Table:
    from rich import box
    from rich.table import Table

    from mpoc.reproduce.figures import image_table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    titles, rows = image_table(result)
    for k, title in enumerate(titles):
        table.add_column(title, justify="right", no_wrap=k < 3)
    for row in rows:
        table.add_row(*row)
    return table
