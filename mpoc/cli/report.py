"""``mpoc report``: the ρ table of a compressed file, from its header alone; and its pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.console import Output, reported_errors

_PICTURES = "Pictures"


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="OUT", help="A compressed file or directory.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One CSV line a layer.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Name every weight left alone, with the reason.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the report as one self-contained page: totals, layers, spectra, entropies, networks.",
            rich_help_panel=_PICTURES,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Draw the same figures as SVG and PNG into a new directory; needs pip install 'mpoc[plot]'.",
            rich_help_panel=_PICTURES,
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="OTHER ...",
            help="Other compressed files on the same page.",
            rich_help_panel=_PICTURES,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing FILE or DIR.", rich_help_panel=_PICTURES),
    ] = False,
) -> None:
    """Show the per-layer ρ table of a compressed file, quick on any size; and draw it.

    Examples:

    mpoc report resnet56.mpo.safetensors --csv > layers.csv

    mpoc report resnet56.mpo.safetensors --html report.html
    """
    with reported_errors():
        from mpoc.cli.tables import print_report
        from mpoc.errors import UsageError
        from mpoc.manifest_file import read_manifest
        from mpoc.report import output_bytes, report_dict, to_csv, to_json

        path, others = _first_and_others(paths, compare or [])
        if as_json and as_csv:
            raise UsageError("--json and --csv: one of them")
        if html is None and plot is None and (others or force):
            given = "--compare" if others else "--force"
            raise UsageError(f"{given} is about a page or pictures", "--html FILE, or --plot DIR")
        manifest = read_manifest(path)
        nbytes = output_bytes(path)
        if html is not None or plot is not None:
            _draw(path, others, html, plot, force)
        if as_json:
            sys.stdout.write(to_json(report_dict(manifest, nbytes)) + "\n")
        elif as_csv:
            sys.stdout.write(to_csv(manifest))
        else:
            print_report(Output().result, manifest, nbytes, verbose=verbose)


def _first_and_others(paths: list[Path], compare: list[Path]) -> tuple[Path, list[Path]]:
    """``OUT --compare A B``: an option takes one value, so B is found among the arguments.

    Raises:
        UsageError: several files without ``--compare``.
    """
    from mpoc.errors import UsageError

    first, *others = paths
    if others and not compare:
        raise UsageError(
            f"{others[0]}: a report is of one file", f"--compare {others[0]} puts it beside the first"
        )
    return first, [*compare, *others]


def _draw(path: Path, others: list[Path], html: Path | None, plot: Path | None, force: bool) -> None:
    """The page, the figures, or both; checked first, and written whole or not at all."""
    from mpoc.manifest import MANIFEST_FILE
    from mpoc.pictures.page import write_page
    from mpoc.pictures.plot import refuse_existing_folder, write_plots
    from mpoc.plotting import require_matplotlib
    from mpoc.writer import refuse_existing

    words = Output()
    if plot is not None:
        require_matplotlib()
    for source in (path, *others):
        if html is not None:
            refuse_existing(html, source / MANIFEST_FILE if source.is_dir() else source, force)
        if plot is not None:
            refuse_existing_folder(plot, source, force)
    if html is not None:
        write_page(path, html, others)
        words.say(f"wrote {html}")
    if plot is not None:
        names = write_plots(path, plot, others, words.say)
        words.say(f"wrote {len(names)} figures into {plot}")
