"""``mpoc reproduce mps-images``: the study that trains nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpoc.cli.console import Output, escape
from mpoc.errors import UsageError

if TYPE_CHECKING:
    from mpoc.reproduce.mps_images import ImageStates, Quality, Request

# Options of ``reproduce`` that it has a use for, by their parameters' names.
TAKES = frozenset({"name", "data", "format", "bonds", "seed", "quick", "output", "plot", "as_json", "quiet"})


def run_images(request: Request, output: Path, plot: Path | None, as_json: bool, words: Output) -> None:
    """Measure, draw, keep the report, and print it."""
    from mpoc.plotting import require_matplotlib
    from mpoc.report import to_json
    from mpoc.reproduce.images_figure import draw_image_figures
    from mpoc.reproduce.mps_images import measure_images
    from mpoc.writer import staged

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
    from mpoc.reproduce.mps_images import SOURCE
    from mpoc.reproduce.pixels import ORDERS

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
    from mpoc.reproduce.images_figure import METHODS

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


def images_request(values: dict[str, Any], bonds: tuple[int, ...]) -> Request:
    """The request of a command line; the study's own bonds where it names none."""
    from mpoc.reproduce.mps_images import BONDS, Request

    same = {name: values[name] for name in ("data", "seed", "quick", "format")}
    return Request(bonds=bonds or BONDS, **same)
