"""``mpoc doctor``: whether mpoc works on this machine, and what mends it where it does not."""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import mpoc
from mpoc.cli.console import Output, escape, reported_errors
from mpoc.runtime.device import DeviceInfo, devices, free_disk, memory, usable_cpus
from mpoc.runtime.formatting import human_bytes
from mpoc.runtime.packages import EXTRAS, PYTHON, Package, install, packages

SCHEMA = "mpoc.doctor/1"
_LITTLE_ROOM = 10**9  # bytes
_OTHER_FOLDER = "name a folder with room, that can be written to: TMPDIR=FOLDER mpoc doctor"


@dataclass(frozen=True)
class Fault:
    """Something that is wrong."""

    what: str
    mend: str
    stops: bool = True  # False: the rest works


@dataclass(frozen=True)
class SelfTestResult:
    """A self-test on one device."""

    device: str
    seconds: float
    difference: float | None  # of the network's outputs, relative; None: it failed


@dataclass
class Examination:
    """All that was found."""

    packages: list[Package] = field(default_factory=list)
    devices: list[DeviceInfo] = field(default_factory=list)
    why_no_device: list[str] = field(default_factory=list)
    cpus: int = 1
    threads: int | None = None  # of torch; None: not importable
    memory: int | None = None
    memory_free: int | None = None
    disk_free: dict[str, int] = field(default_factory=dict)
    trials: list[SelfTestResult] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether nothing stops mpoc from working."""
        return not any(fault.stops for fault in self.faults)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        about = {"schema": SCHEMA, "well": self.is_well, "mpoc": mpoc.__version__, **where()}
        return about | asdict(self)


def where() -> dict[str, str]:
    """The places of mpoc and Python, and the system."""
    folder = Path(mpoc.__file__).parent
    return {"folder": str(folder), "python": sys.executable, "platform": platform.platform()}


def examine() -> Examination:
    """Look at everything, then try it; what is wrong becomes faults."""
    found = Examination(cpus=usable_cpus())
    found.memory, found.memory_free = memory()
    _look_at_packages(found)
    _look_at_disk(found)
    _look_at_torch(found)
    if found.threads is not None:
        for device in ("cpu", *(device.name for device in found.devices if device.is_used)):
            _try(found, device)
    return found


def _look_at_packages(found: Examination) -> None:
    try:
        found.packages = packages()
    except metadata.PackageNotFoundError:
        what = "mpoc runs from a folder and is not installed: what it needs is not known"
        found.faults.append(Fault(what, "pip install FOLDER", stops=False))
    for package in found.packages:
        if package.is_right or (package.extra and package.version is None):
            continue
        has = f"{package.version} is outside {package.needs}" if package.version else "is not installed"
        extra = f", which the extra {package.extra} asks for" if package.extra else ""
        found.faults.append(Fault(f"{package.name} {has}{extra}", package.mend, package.extra is None))


def _look_at_disk(found: Examination) -> None:
    try:
        found.disk_free = free_disk()
    except OSError as error:
        found.faults.append(Fault(f"no temporary folder: {error}", _OTHER_FOLDER, stops=False))
    for folder, free in found.disk_free.items():
        if free < _LITTLE_ROOM:
            what = f"{human_bytes(free)} free in {folder}"
            found.faults.append(Fault(what, "make room, or write elsewhere with -o", stops=False))


def _look_at_torch(found: Examination) -> None:
    try:
        import torch

        found.devices, found.why_no_device = devices()
        found.threads = torch.get_num_threads()
    except (ImportError, OSError) as error:
        known = {package.name: package for package in found.packages}
        if "torch" not in known or known["torch"].version is not None:  # else it is told already
            mend = known["torch"].mend if "torch" in known else "pip install torch"
            mend = mend.replace("install", "install --force-reinstall")
            found.faults.append(Fault(f"torch cannot be imported: {_first_line(error)}", mend))


def _try(found: Examination, device: str) -> None:
    """The self-test, in a temporary folder; whatever goes wrong in it is a fault."""
    start = time.perf_counter()
    difference: float | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="mpoc-doctor-") as folder:
            from mpoc.cli.self_test import self_test

            difference = self_test(device, Path(folder))
    except Exception as error:  # whatever it is, it is what was asked for
        what = f"self-test on {device}: {error.__class__.__name__}: {_first_line(error)}"
        found.faults.append(Fault(what, _mend(error, device)))
    found.trials.append(SelfTestResult(device, round(time.perf_counter() - start, 3), difference))


def _mend(error: Exception, device: str) -> str:
    if isinstance(error, OSError):
        return _OTHER_FOLDER
    if device != "cpu":
        return "--device cpu works around it; a torch built for this device: https://pytorch.org/get-started"
    return "reinstall torch and mpoc; where it stays, tell the makers what mpoc doctor --json prints"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def lines(found: Examination) -> Iterator[tuple[str, str]]:
    """A line each: what, and what it is."""
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
    uses = "" if found.threads is None else f", of which torch uses {found.threads}"
    yield "CPUs", f"{found.cpus}{uses}"
    if found.memory is not None:
        free = "" if found.memory_free is None else f", {human_bytes(found.memory_free)} free"
        yield "memory", human_bytes(found.memory) + free
    for device in found.devices:
        size = "" if device.memory is None else f", {human_bytes(device.memory)}"
        yield device.name, device.title + size + ("" if device.is_used else " (not used: no float64)")
    if not found.devices and found.threads is not None:
        yield "GPUs", "; ".join(["none", *found.why_no_device])
    for folder, room in found.disk_free.items():
        yield "disk", f"{human_bytes(room)} free in {folder}"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON on stdout.")] = False,
) -> None:
    """Tell versions, extras and devices, and try mpoc on each device: a self-test of seconds.

    The exit status is 1 where something stops mpoc from working; each fault is a line with what mends it.

    Example: mpoc doctor
    """
    with reported_errors():
        from mpoc.reporting.summary import to_json

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
