"""The table of a study that compares fully connected layers: parameters, compression, accuracy, time."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mpoc.cli.console import escape
from mpoc.reproduce.cell import DENSE
from mpoc.reproduce.compression import baseline_counts, counts
from mpoc.reproduce.study import Reproduction, Row

_COLUMNS = (
    "parameters", "fully connected", "paper", "total", "paper", "compression", "of all", "final %", "best %",
    "paper %", "steps", "ms a step",
)  # fmt: skip


def compression_table(done: Reproduction) -> Table:
    """A line a network, the paper's numbers beside ours."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("network", overflow="fold")
    for title in _COLUMNS:
        table.add_column(title, justify="right")
    for row in done.rows:
        table.add_row(*map(escape, _cells(done, row)))
    return table


def _cells(done: Reproduction, row: Row) -> list[str]:
    own, paper = counts(done.study, row.experiment.network, row.parameters), row.published
    printed = [f"{number:,}" if number else "" for number in (paper.parameters if paper else (0, 0))]
    parts, whole = own.of(baseline_counts(done.study))
    steps, milliseconds = row.results[0].steps, row.results[0].milliseconds
    return [
        _label(done, row),
        f"{row.parameters:,}",
        f"{own.fully_connected:,}",
        printed[0],
        f"{own.total:,}",
        printed[1],
        f"{parts:,.0f}",
        f"{whole:.2f}",
        f"{row.mean('final')[0]:.2f}",
        f"{row.mean('best')[0]:.2f}",
        "" if paper is None or paper.accuracy is None else f"{paper.accuracy:.2f}",
        f"{steps:,}",
        "" if milliseconds is None else f"{milliseconds:.0f}",
    ]


def _label(done: Reproduction, row: Row) -> str:
    """As the paper names it: ``FC-1``, ``MERA-2``."""
    if row.start != DENSE:
        name, comma, rest = row.experiment.label.partition(",")
        return f"{name}-{row.bond}{comma}{rest}"
    dense = (one for one in done.study.variants.values() if not one.layers)
    return next(one.label for one in dense if one.network == row.experiment.network)
