"""``mpoc report``: the ρ table of a compressed file, from its header alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.console import Output, reported_errors


def report(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed file or directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One CSV line a layer.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Name every weight left alone, with the reason.")
    ] = False,
) -> None:
    """Show the per-layer ρ table of a compressed file; quick on any size.

    Example: mpoc report resnet56.mpo.safetensors --csv > layers.csv
    """
    with reported_errors():
        from mpoc.cli.tables import print_report
        from mpoc.errors import UsageError
        from mpoc.manifest import read_manifest
        from mpoc.report import output_bytes, report_dict, to_csv, to_json

        if as_json and as_csv:
            raise UsageError("--json and --csv: one of them")
        manifest = read_manifest(path)
        nbytes = output_bytes(path)
        if as_json:
            sys.stdout.write(to_json(report_dict(manifest, nbytes)) + "\n")
        elif as_csv:
            sys.stdout.write(to_csv(manifest))
        else:
            print_report(Output().result, manifest, nbytes, verbose=verbose)
