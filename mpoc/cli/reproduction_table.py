"""The table of ``mpoc reproduce``: parameters, ρ, accuracies, seconds, and the paper's number beside them."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from mpoc.cli.compression_table import compression_table
from mpoc.cli.console import escape
from mpoc.reproduce.cell import DENSE
from mpoc.reproduce.study import Reproduction, Row

_STARTED = "TT-SVD starts from the trained dense network of the same seed; random cores start from nothing"
_STARTS = {DENSE: "dense", "ttsvd": "MPO, TT-SVD", "random": "MPO, random"}


def print_reproduction(console: Console, done: Reproduction) -> None:
    """The table, the structures, and what the numbers are."""
    experiment = done.rows[0].experiment
    if done.quick:
        console.print("--quick: a smoke run; its accuracies say nothing of the experiment", soft_wrap=True)
    console.print(compression_table(done) if done.study.baseline else _table(done))
    for label, structure in dict.fromkeys(_structures(done)):
        console.print(escape(f"{label}: {structure}"), soft_wrap=True)
    for line in _effective(done):
        console.print(escape(line), soft_wrap=True)
    note = f" ({experiment.training.note})" if experiment.training.note else ""
    runs = f"{len(done.seeds)} runs, seeds {done.seeds[0]} to {done.seeds[-1]}"
    lines = [
        f"every network: {experiment.training.words()}{note}; "
        f"{runs if len(done.seeds) > 1 else f'seed {done.seeds[0]}'}",
        done.material.reported(),
        *([_STARTED] if any(row.start == "ttsvd" for row in done.rows) else []),
        f"paper: {done.study.source}, on {experiment.data}",
    ]
    lines += dict.fromkeys(note for row in done.rows for note in row.experiment.notes)
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _structures(done: Reproduction) -> list[tuple[str, str]]:
    """Of each experiment; many layers of one structure are named once."""
    found: list[tuple[str, str]] = []
    for row in done.rows:
        names: dict[str, list[str]] = {}
        for layer in row.experiment.layers:
            name, _, structure = layer.notation().partition(" ")
            names.setdefault(structure, []).append(name)
        shown = "; ".join(f"{_joined(layers)} {structure}" for structure, layers in names.items())
        if shown:
            found.append((row.experiment.label, shown))
    return found


def _effective(done: Reproduction) -> list[str]:
    """Of networks whose bonds were chosen: how many Schmidt values count at each, of the first run."""
    found = []
    for row in done.rows:
        if row.experiment.discard and row.start != DENSE:
            for layer, entropies in row.results[0].entropies.items():
                numbers = " ".join(f"{math.exp(entropy):.1f}" for entropy in entropies)
                found.append(f"{row.experiment.label}, {layer}: effective components exp(S) {numbers}")
    return found


def _joined(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, …, {names[-1]} ({len(names)} layers)"


def _table(done: Reproduction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("network", overflow="fold")
    table.add_column("weights", no_wrap=True)
    for title in ("D", "parameters", "replaced layers", "ρ", "before", "final %", "best %", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("paper %", overflow="fold")
    for row in done.rows:
        table.add_row(*map(escape, _cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    dense = row.start == DENSE
    own = ", ".join(dict.fromkeys(str(layer.bond) for layer in row.experiment.layers if layer.bond))
    bond = "" if dense else str(row.bond or own)
    if row.experiment.discard and not dense:
        bond = ", ".join(" ".join(map(str, bonds)) for bonds in row.results[0].bonds.values())
    return [
        row.experiment.network if dense else row.experiment.label,
        _STARTS[row.start],
        bond,
        f"{row.parameters:,}",
        f"{row.replaced:,}",
        "1" if dense else f"{row.rho:.4g}",
        f"{row.mean('start')[0]:.2f}",
        _with_sigma(row, "final"),
        _with_sigma(row, "best"),
        f"{row.mean('seconds')[0]:.0f}",
        str(row.published or ""),
    ]


def _with_sigma(row: Row, name: str) -> str:
    mean, sigma = row.mean(name)
    return f"{mean:.2f}" if sigma is None else f"{mean:.2f} ± {sigma:.2f}"
