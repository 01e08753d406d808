"""The ``mpoc`` command: one module per command, imported when the command is called.

The list of the commands stands here, so that ``mpoc --help`` imports none of them, and a command does not
import the options of the others. torch is imported when a command runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import mpoc
from mpoc.cli.options import Command
from mpoc.runtime.distributed import exit_process

# Name → first paragraph of its help, in the order of the list.
SUMMARIES = {
    "compress": "Compress a checkpoint: store weights in few bits, or replace them by tensor networks.",
    "inspect": "Show what a checkpoint holds: layers by kind, dtypes, size, and what can be compressed.",
    "report": (
        "Show the per-layer ρ table of a compressed file, fast on any size; write it as a page with figures."
    ),
    "entanglement": (
        "Show the entanglement entropy and the effective bond at every cut of each layer's chain."
    ),
    "expand": (
        "Write dense weights under their original names, shapes and dtypes, so that anything can load them."
    ),
    "finetune": "Train a network on a data set: the cores and all else, from one process or many.",
    "eval": "Measure a network, dense or compressed, on a data set: accuracy, loss, perplexity, or fidelity.",
    "reproduce": "Repeat an experiment of a paper: dense, MPO-Net from TT-SVD, MPO-Net from random cores.",
    "export": "Write the compressed network as a program that runs without mpoc; the batch size stays free.",
    "demo": (
        "Compress a small network for handwritten digits and fine-tune it: ρ table, accuracy at each stage."
    ),
    "doctor": "Show versions, extras and devices, and test mpoc on each device; takes seconds.",
    "guide": "Show the manual, one page per topic.",
}
_FUNCTIONS = {"eval": "evaluate"}  # of the commands whose function has another name


def load_command(name: str) -> Any:
    """Import the module of a command and build its parameters."""
    function = getattr(import_module(f"mpoc.cli.{name}"), _FUNCTIONS.get(name, name))
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, cls=Command)(function)
    return typer.main.get_command(single)


class Commands(TyperGroup):
    """A group that lists its commands by their summaries and loads the one that is called."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        for name, summary in SUMMARIES.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments name, with its options."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load_command(name), rest


app = typer.Typer(
    name="mpoc",
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress a trained network: weights in few bits, or as tensor networks.",
    epilog="Start with: mpoc demo",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpoc {mpoc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress a trained network: weights in few bits, or as tensor networks."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        exit_process(130)
    except SystemExit as done:
        exit_process(done.code if isinstance(done.code, int) else int(done.code is not None))
