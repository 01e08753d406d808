"""``mpoc report``: the ρ table of a compressed file, from its header alone; and its page and figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.errors import UsageError, command_line
from mpoc.runtime.options import argument, option

_FIGURES = "Page and figures"
_STDOUT = Path("-")


@dataclass(frozen=True)
class ReportOptions:
    """The command line of ``mpoc report``."""

    paths: tuple[Path, ...] = argument("OUT", "A compressed file or directory.", repeated=True)
    as_json: bool = option("Print the report as JSON.", False, "--json")
    as_csv: bool = option("Print one CSV line per layer.", False, "--csv")
    verbose: bool = option("Name every unchanged weight, with the reason.", False)
    html: Path | None = option(
        "Write the report as one self-contained page; - prints it.", None, metavar="FILE", panel=_FIGURES
    )
    plot: Path | None = option(
        "Draw the figures as SVG and PNG into a new directory.", None, metavar="DIR", panel=_FIGURES
    )
    compare: tuple[Path, ...] = option(
        "Show other compressed files on the same page.",
        (), metavar="OTHER ...", panel=_FIGURES, repeated=True,
    )  # fmt: skip
    force: bool = option("Replace an existing FILE or DIR.", False, panel=_FIGURES)


@takes(ReportOptions)
def report(options: ReportOptions) -> None:
    """Show the per-layer ρ table of a compressed file, fast on any size; write it as a page with figures.

    --plot needs matplotlib, which the extra 'plot' installs.

    Examples:

    mpoc report resnet56.mpo.safetensors --csv > layers.csv

    mpoc report resnet56.mpo.safetensors --html report.html
    """
    from mpoc.cli.tables import print_report
    from mpoc.io.manifest_reader import read_manifest
    from mpoc.io.weight_files import output_bytes
    from mpoc.reporting.summary import report_dict, to_csv, to_json

    path, others = _first_and_others(options.paths, options.compare)
    on_stdout = options.html == _STDOUT
    formats = {"--json": options.as_json, "--csv": options.as_csv, "--html -": on_stdout}
    _refuse_two_results([name for name, chosen in formats.items() if chosen])
    _refuse_undrawn(options.html, options.plot, others, options.force)
    manifest = read_manifest(path)
    nbytes = output_bytes(path)
    file = None if on_stdout else options.html
    if file is not None or options.plot is not None:
        _draw(path, others, file, options.plot, options.force)
    if on_stdout:
        _print_page(path, others)
    elif options.as_json:
        sys.stdout.write(to_json(report_dict(manifest, nbytes)) + "\n")
    elif options.as_csv:
        sys.stdout.write(to_csv(manifest))
    else:
        print_report(Output().result, manifest, nbytes, verbose=options.verbose)


def _first_and_others(paths: tuple[Path, ...], compare: tuple[Path, ...]) -> tuple[Path, list[Path]]:
    """The file to report, and the others of ``OUT --compare A B``, whose B arrives among the arguments.

    Raises:
        UsageError: several files without ``--compare``.
    """
    first, *others = paths
    if others and not compare:
        raise UsageError(
            f"{others[0]}: a report shows one file",
            command_line("mpoc", "report", first, "--compare", others[0], "--html", "FILE"),
        )
    return first, [*compare, *others]


def _refuse_two_results(given: list[str]) -> None:
    """Refuse more than one result on stdout."""
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: stdout takes one result")


def _refuse_undrawn(html: Path | None, plot: Path | None, others: list[Path], force: bool) -> None:
    """Refuse options of pages and figures where none is asked for, and figures on stdout."""
    if plot == _STDOUT:
        raise UsageError("--plot -: figures need a directory", "--plot DIR, or --html -")
    if html is None and plot is None and (others or force):
        given = "--compare" if others else "--force"
        raise UsageError(f"{given} requires a page or figures", "--html FILE, or --plot DIR")


def _draw(path: Path, others: list[Path], html: Path | None, plot: Path | None, force: bool) -> None:
    """Write the page, the figures, or both; all checks come first."""
    from mpoc.io.atomic import refuse_existing
    from mpoc.io.manifest import MANIFEST_FILE
    from mpoc.reporting.html import write_page
    from mpoc.reporting.plots import refuse_existing_folder, require_matplotlib, write_plots

    console = Output()
    if plot is not None:
        require_matplotlib()
    for source in (path, *others):
        if html is not None:
            refuse_existing(html, source / MANIFEST_FILE if source.is_dir() else source, force)
        if plot is not None:
            refuse_existing_folder(plot, source, force)
    if html is not None:
        write_page(path, html, others)
        console.say(f"wrote {html}")
    if plot is not None:
        names = write_plots(path, plot, others, console.say)
        console.say(f"wrote {len(names)} figures into {plot}")


def _print_page(path: Path, others: list[Path]) -> None:
    """Print the page on stdout, in UTF-8 as its header declares."""
    from mpoc.reporting.contents import read_files
    from mpoc.reporting.html import page

    sys.stdout.buffer.write(page(read_files(path, others)).encode())
