"""``mpoc reproduce``: the papers' experiments, the paper's numbers beside ours.

``mpoc reproduce mps-images``: the study that trains nothing.
"""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mpoc.cli.console import Output, escape, reported_errors
from mpoc.cli.data_options import DATA, DataPath, Format
from mpoc.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpoc.reproduce.image_states import ImageStates, ImageStatesRequest, Quality
    from mpoc.reproduce.study import Reproduction, StudyRequest
    from mpoc.train.monitor import TrainingEvent


_WHAT = "What is trained"
_HOW = "How"
_OUT = "Output"
_IMAGES = "mps-images"

# Options of ``reproduce`` that it has a use for, by their parameters' names.
TAKES = frozenset({"name", "data", "format", "bonds", "seed", "quick", "output", "plot", "as_json", "quiet"})


def reproduce(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="fc2, lenet5, vgg16, vgg19, resnet, densenet (Gao et al. 2020), mera (Hallam et al. 2017), "
            "harada or picogpt; or mps-images, where images are what is compressed.",
        ),
    ],
    data: DataPath,
    format: Format = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            "--hold-out",
            help="Share of the training split on which the best weights are chosen; 0: the last ones count. "
            "Default: 0.1 of mera, where it also ends training, else 0.",
            rich_help_panel=DATA,
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="V[,V…]",
            help="Of resnet: its depths, or as 56-resunit with the last ResUnit. Of densenet: (n, m, k) as "
            "16-12-24, or convolution. Of harada: raster or morton order, and as morton-random-0.1 with "
            "automatic bonds. Of mera: fc-1, fc-2, fc-2-printed, mera, tt, mera-channels. all: every one. "
            "Default: the first; of harada and mera all.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(metavar="L[,L…]", help="Of resnet: 20, 32, 44, 56, 110.", rich_help_panel=_WHAT),
    ] = None,
    bonds: Annotated[
        str | None,
        typer.Option(metavar="D[,D…]", help="Default: the paper's.", rich_help_panel=_WHAT),
    ] = None,
    starts: Annotated[
        str,
        typer.Option(
            metavar="S[,S]",
            help="ttsvd, from the trained dense network, and random, as the paper.",
            rich_help_panel=_WHAT,
        ),
    ] = "ttsvd,random",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER=INPUTS:OUTPUTS",
            help="Another factoring of a layer beside the paper's, as fc1=28x28:16x16. Repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Of each network. Default: the recipe's.", rich_help_panel=_HOW)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps, in the place of epochs.", rich_help_panel=_HOW)
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's own training, long.", rich_help_panel=_HOW)
    ] = False,
    no_l2: Annotated[
        bool, typer.Option("--no-l2", help="Without the second term of Eq. (7).", rich_help_panel=_HOW)
    ] = False,
    runs: Annotated[int, typer.Option(help="Seeds of every network: mean ± σ.", rich_help_panel=_HOW)] = 1,
    seed: Annotated[int, typer.Option(help="The first.", rich_help_panel=_HOW)] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A smoke run: ten steps on a part of the data.", rich_help_panel=_HOW),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_HOW)] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Finished networks are kept there and used again. Default: reproduce-NAME/.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw the paper's figure and the curves there.", rich_help_panel=_OUT
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The table as JSON on stdout.", rich_help_panel=_OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Results and errors only.", rich_help_panel=_OUT)
    ] = False,
) -> None:
    """Repeat an experiment of a paper: dense, MPO-Net from TT-SVD, MPO-Net from random cores.

    Every network gets the same training. Given again, an interrupted command goes on where it stopped.

    Examples:

    mpoc reproduce fc2 --data mnist/ --quick --plot figures/

    mpoc reproduce mps-images --data mnist/ --quick

    mpoc reproduce fc2 --data mnist/ --epochs 1 --bonds 4,16 --shape 'fc1=28x28:16x16' --json
    """
    values = dict(locals())
    with reported_errors():
        words = Output(quiet)
        if name == _IMAGES:
            _reproduce_images(context, values, words)
            return
        done = _run(_request(values), plot, words)
        if as_json:
            from mpoc.reporting.summary import to_json

            sys.stdout.write(to_json(done.as_dict()) + "\n")
        else:
            from mpoc.cli.tables import print_reproduction

            print_reproduction(words.result, done)


def _reproduce_images(context: typer.Context, values: dict[str, Any], words: Output) -> None:

    sources = ((parameter, context.get_parameter_source(parameter)) for parameter in context.params)
    refuse_training_options([name for name, source in sources if source and source.name == "COMMANDLINE"])
    request = images_request(values, _bonds(values))
    output = values["output"] or Path(f"reproduce-{_IMAGES}")
    run_images(request, output, values["plot"], values["as_json"], words)


def _request(values: dict[str, Any]) -> StudyRequest:
    from mpoc.compression.recipe_syntax import parse_shape
    from mpoc.reproduce.catalogue import StudyChoice, find_study
    from mpoc.reproduce.study import StudyRequest

    study = find_study(values["name"])
    if values["depth"] is not None and (study.axis != "depth" or values["variants"] is not None):
        raise UsageError("--depth is of resnet, and in the place of --variants")
    variants = _words(values["variants"] if values["depth"] is None else values["depth"])
    shapes = []
    for text in values["shape"] or ():
        rule = parse_shape(text)
        if rule.pattern is None:
            raise UsageError(f"--shape {text}: names no layer", "as --shape 'fc1=28x28:16x16'")
        shapes.append((text, {rule.pattern: (rule.output_factors, rule.input_factors)}))
    choice = StudyChoice(
        tuple(study.variants) if variants == ("all",) else variants,
        _bonds(values),
        tuple(shapes), values["paper"], values["epochs"], values["steps"], not values["no_l2"],
    )  # fmt: skip
    same = ("name", "data", "runs", "seed", "quick", "format", "device")
    return StudyRequest(
        **{name: values[name] for name in same},
        held_out=study.held_out if values["held_out"] is None else values["held_out"],
        output=values["output"] or Path(f"reproduce-{study.name}"),
        choice=choice,
        starts=_words(values["starts"]),
    )


def _bonds(values: dict[str, Any]) -> tuple[int, ...]:
    return tuple(_whole("--bonds", word) for word in _words(values["bonds"]))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (text or "").split(","))))


def _whole(option: str, word: str) -> int:
    if not word.isdecimal() or len(word) > 15:
        raise UsageError(f"{option} {word}: not whole numbers with commas between, as 2,4,8")
    return int(word)


def _run(request: StudyRequest, plot: Path | None, words: Output) -> Reproduction:
    """Train, draw, and keep the report beside the networks."""
    from mpoc.io.atomic import staged
    from mpoc.reporting.plots import require_matplotlib
    from mpoc.reporting.summary import to_json
    from mpoc.reproduce.figures import draw_figures
    from mpoc.reproduce.study import run_study
    from mpoc.runtime.signals import Interrupted

    if plot is not None:
        require_matplotlib()
    try:
        with _live_progress(words) as told:
            done = run_study(request, words.say, told)
    except (Interrupted, KeyboardInterrupt) as stop:
        words.say(f"stopped; finished networks are in {request.output}")
        words.next_command(f"mpoc {shlex.join(sys.argv[1:])}")
        raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    report = request.output / "report.json"
    with staged(report) as target:
        target.write_text(to_json(done.as_dict()) + "\n", "utf-8")
    written = [report, *(draw_figures(done, plot) if plot is not None else ())]
    words.say(f"wrote {', '.join(map(str, written))}")
    return done


@contextmanager
def _live_progress(words: Output) -> Iterator[Callable[[TrainingEvent], None] | None]:
    """A bar on a terminal; elsewhere the lines of finished networks are enough."""
    from mpoc.cli.progress import training_progress

    if not words.words.is_terminal:
        yield None
        return
    with training_progress(words) as told:
        yield told


def run_images(
    request: ImageStatesRequest, output: Path, plot: Path | None, as_json: bool, words: Output
) -> None:
    """Measure, draw, keep the report, and print it."""
    from mpoc.io.atomic import staged
    from mpoc.reporting.plots import require_matplotlib
    from mpoc.reporting.summary import to_json
    from mpoc.reproduce.figures import draw_image_figures
    from mpoc.reproduce.image_states import measure_images

    if plot is not None:
        require_matplotlib()
    done = measure_images(request, words.say)
    output.mkdir(parents=True, exist_ok=True)
    text, report = to_json(done.as_dict()) + "\n", output / "report.json"
    with staged(report) as target:
        target.write_text(text, "utf-8")
    written = [report, *(draw_image_figures(done, plot) if plot is not None else ())]
    words.say(f"wrote {', '.join(map(str, written))}")
    if as_json:
        sys.stdout.write(text)
    else:
        print_images(words.result, done)


def refuse_training_options(given: list[str]) -> None:
    """Refuse options that have no meaning where nothing is trained.

    Args:
        given: names of the parameters that stand on the command line.

    Raises:
        UsageError: one of them.
    """
    for name in given:
        if name not in TAKES:
            raise UsageError(f"--{name.replace('_', '-')} is of studies that train networks", "leave it away")


def print_images(console: Console, done: ImageStates) -> None:
    """The table, the entropies, and what the numbers are."""
    from mpoc.reproduce.image_states import ORDERS, SOURCE

    if done.quick:
        console.print(f"--quick: {len(done.images)} images", soft_wrap=True)
    console.print(_table(done))
    for order, values in done.entropies.items():
        shown = " ".join(f"{value:.3f}" for value in values)
        name = f"entanglement entropy, {ORDERS[order]}"
        console.print(f"{name}, bonds 1 to {len(values)}: {shown}", soft_wrap=True)
    shape = "×".join(map(str, done.images.shape[1:]))
    colour = "a site of 3 colours in front of " if done.images.shape[1] == 3 else ""
    for line in (
        f"{len(done.images):,} images of {shape} ({done.split}), as {colour}sites of 4, coarse to fine; "
        "errors on the image's own pixels",
        "dB: mean over the images of 10 log₁₀(1/mean squared error), peak 1; an error below that of 8-bit "
        "pixels counts as theirs, 58.9 dB",
        "numbers of a state are its cores'; of rank r of a matrix (colours and rows, columns) its two "
        "factors'; of a cosine coefficient its value, at a place of its own its place too",
        f"source: {SOURCE}",
    ):
        console.print(escape(line), soft_wrap=True)


def _table(done: ImageStates) -> Table:
    from mpoc.reproduce.figures import METHODS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("D", "numbers", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in (*done.states, *done.peers):
        table.add_column(f"{METHODS[name]} dB", justify="right")
    columns = [*done.states.values(), *done.peers.values()]
    for k, at in enumerate(columns[0]):
        cells = [str(at.kept), f"{at.numbers:,}", f"{at.numbers / done.pixels:.3f}"]
        table.add_row(*cells, *(_decibels(column[k]) for column in columns))
    return table


def _decibels(at: Quality) -> str:
    return f"{at.decibels:.2f}" if at.kept else "–"


def images_request(values: dict[str, Any], bonds: tuple[int, ...]) -> ImageStatesRequest:
    """The request of a command line; the study's own bonds where it names none."""
    from mpoc.reproduce.image_states import BONDS, ImageStatesRequest

    same = {name: values[name] for name in ("data", "seed", "quick", "format")}
    return ImageStatesRequest(bonds=bonds or BONDS, **same)
