"""``mpoc doctor``: whether mpoc works here, and what mends it where it does not."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mpoc.cli.console import Output, escape, reported_errors


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON on stdout.")] = False,
) -> None:
    """Tell versions, extras and devices, and try mpoc on each device: a self-test of seconds.

    The exit status is 1 where something stops mpoc from working; each fault is a line with what mends it.

    Example: mpoc doctor
    """
    with reported_errors():
        from mpoc.doctor import examine, lines
        from mpoc.report import to_json

        found = examine()
        words = Output()
        if as_json:
            sys.stdout.write(to_json(found.as_dict()) + "\n")
        else:
            for title, text in lines(found):
                words.result.print(f"{escape(f'{title:<12}')}{escape(text)}", soft_wrap=True)
            for fault in found.faults:
                title = "[bold red]fault[/]" if fault.stops else "[bold yellow]note[/]"
                words.result.print(f"{title}: {escape(fault.what)}: {escape(fault.mend)}", soft_wrap=True)
            words.result.print("all is well" if found.is_well else "mpoc does not work as it should here")
    if not found.is_well:
        raise SystemExit(1)
