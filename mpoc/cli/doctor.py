"""``mpoc doctor``: whether mpoc works here, and what mends it where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import mpoc
from mpoc.cli.console import Output, reported_errors
from mpoc.installed import EXTRAS, PYTHON, install
from mpoc.report import human_bytes, to_json

if TYPE_CHECKING:
    from mpoc.doctor import Examination


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON on stdout.")] = False,
) -> None:
    """Tell versions, extras and devices, and try mpoc on each device: a self-test of seconds.

    The exit status is 1 where something stops mpoc from working; each fault is a line with what mends it.

    Example: mpoc doctor
    """
    with reported_errors():
        from mpoc.doctor import examine

        found = examine()
        words = Output()
        if as_json:
            sys.stdout.write(to_json(found.as_dict()) + "\n")
        else:
            for title, text in _lines(found):
                words.result.print(f"{escape(f'{title:<12}')}{escape(text)}", soft_wrap=True)
            for fault in found.faults:
                title = "[bold red]fault[/]" if fault.stops else "[bold yellow]note[/]"
                words.result.print(f"{title}: {escape(fault.what)}: {escape(fault.mend)}", soft_wrap=True)
            words.result.print("all is well" if found.is_well else "mpoc does not work as it should here")
    if not found.is_well:
        raise SystemExit(1)


def _lines(found: Examination) -> Iterator[tuple[str, str]]:
    """A line each: what, and what it is."""
    from mpoc.doctor import where

    places = where()
    yield "mpoc", f"{mpoc.__version__} in {places['folder']}"
    for package in found.packages:
        if package.extra is None:
            place = f" in {places['python']}" if package.name == PYTHON else ""
            yield package.name, f"{package.version or 'not installed'} (needs {package.needs}){place}"
    for extra in EXTRAS:
        there = [package for package in found.packages if package.extra == extra]
        lacks = [package.name for package in there if package.version is None]
        has = ", ".join(f"{package.name} {package.version}" for package in there if package.version)
        if there:
            more = f"without {', '.join(lacks)}: {install(extra)}" if lacks else ""
            yield f"mpoc[{extra}]", "; ".join(filter(None, [has, more]))
    yield "platform", places["platform"]
    yield from _machine_lines(found)
    for trial in found.trials:
        how = "failed" if trial.difference is None else f"passed, outputs differ by {trial.difference:.1g}"
        yield "self-test", f"{trial.device}: {how} ({trial.seconds:.1f} s)"


def _machine_lines(found: Examination) -> Iterator[tuple[str, str]]:
    yield (
        "CPUs",
        f"{found.cpus}" + ("" if found.threads is None else f", of which torch uses {found.threads}"),
    )
    if found.memory is not None:
        free = "" if found.memory_free is None else f", {human_bytes(found.memory_free)} free"
        yield "memory", human_bytes(found.memory) + free
    for device in found.devices:
        size = "" if device.memory is None else f", {human_bytes(device.memory)}"
        yield device.name, device.title + size + ("" if device.is_used else " (not used: no float64)")
    if not found.devices:
        yield "GPUs", "; ".join(["none", *found.why_no_device])
    for folder, room in found.disk_free.items():
        yield "disk", f"{human_bytes(room)} free in {folder}"
