"""The ``mpoc`` command: one module per command, torch imported only when a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

import mpoc
from mpoc.cli.compress import compress
from mpoc.cli.demo import demo
from mpoc.cli.doctor import doctor
from mpoc.cli.entanglement import entanglement
from mpoc.cli.eval import evaluate
from mpoc.cli.expand import expand
from mpoc.cli.export import export
from mpoc.cli.finetune import finetune
from mpoc.cli.guide import guide
from mpoc.cli.options import Command
from mpoc.cli.report import report
from mpoc.cli.reproduce import reproduce
from mpoc.runtime.distributed import exit_process

app = typer.Typer(
    name="mpoc",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress a trained network: each linear map becomes a matrix product operator.",
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
    """Compress a trained network: each linear map becomes a matrix product operator."""


for command in (compress, report, entanglement, expand, finetune):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluate)
for command in (reproduce, export, demo, doctor, guide):
    app.command(cls=Command)(command)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        exit_process(130)
    except SystemExit as done:
        exit_process(done.code if isinstance(done.code, int) else int(done.code is not None))
