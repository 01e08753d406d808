"""``mpoc report``: the ρ table of a compressed file, from its header alone; and its pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.console import Output, reported_errors

_PICTURES = "Pictures"
_STDOUT = Path("-")


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
            help="Write the report as one self-contained page: totals, layers, spectra, entropies, networks; "
            "- is stdout, in the table's place.",
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
        from mpoc.io.manifest_reader import read_manifest
        from mpoc.io.weight_files import output_bytes
        from mpoc.reporting.summary import report_dict, to_csv, to_json

        path, others = _first_and_others(paths, compare or [])
        formats = {"--json": as_json, "--csv": as_csv, "--html -": html == _STDOUT}
        _refuse_two_results([name for name, chosen in formats.items() if chosen])
        _refuse_undrawn(html, plot, others, force)
        manifest = read_manifest(path)
        nbytes = output_bytes(path)
        file = None if html == _STDOUT else html
        if file is not None or plot is not None:
            _draw(path, others, file, plot, force)
        if html == _STDOUT:
            _print_page(path, others)
        elif as_json:
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


def _refuse_two_results(given: list[str]) -> None:
    """Stdout takes one result.

    Raises:
        UsageError: it would have several.
    """
    from mpoc.errors import UsageError

    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: one of them")


def _refuse_undrawn(html: Path | None, plot: Path | None, others: list[Path], force: bool) -> None:
    """Check what is about pictures.

    Raises:
        UsageError: there are none, or figures would go to stdout.
    """
    from mpoc.errors import UsageError

    if plot == _STDOUT:
        raise UsageError("--plot -: stdout takes one page, not a directory", "--plot DIR, or --html -")
    if html is None and plot is None and (others or force):
        given = "--compare" if others else "--force"
        raise UsageError(f"{given} is about a page or pictures", "--html FILE, or --plot DIR")


def _draw(path: Path, others: list[Path], html: Path | None, plot: Path | None, force: bool) -> None:
    """The page, the figures, or both; checked first, and written whole or not at all."""
    from mpoc.io.atomic import refuse_existing
    from mpoc.io.manifest import MANIFEST_FILE
    from mpoc.reporting.html import write_page
    from mpoc.reporting.plots import refuse_existing_folder, require_matplotlib, write_plots

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


def _print_page(path: Path, others: list[Path]) -> None:
    """In the encoding that the page says it has."""
    from mpoc.reporting.contents import read_files
    from mpoc.reporting.html import page

    sys.stdout.buffer.write(page(read_files(path, others)).encode())
