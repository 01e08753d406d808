"""``mpoc doctor``: check whether mpoc works on this machine, and name the remedy where it does not."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpoc
from mpoc.cli.console import Output, plain, titled
from mpoc.cli.options import takes
from mpoc.compression.recipe_syntax import ShapeRule
from mpoc.errors import MpocError
from mpoc.runtime.device import DeviceInfo, devices, free_disk, memory, usable_cpus
from mpoc.runtime.formatting import human_bytes
from mpoc.runtime.options import option
from mpoc.runtime.packages import EXTRAS, PYTHON, Package, install, packages

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCHEMA = "mpoc.doctor/1"
_LITTLE_SPACE = 10**9  # bytes
_OTHER_FOLDER = "name a writable folder with free space: TMPDIR=FOLDER mpoc doctor"

_BOND = 3
_SHAPES = (
    ShapeRule("0", output_factors=(4, 2), input_factors=(2, 2)),
    ShapeRule("2", output_factors=(8, 4), input_factors=(16, 8)),
    ShapeRule("4", output_factors=(6, 4), input_factors=(8, 4)),
)
# Largest relative difference that passes. Convolutions on a GPU keep 10 bits of each number (TF32); a wrong
# result differs by about 1.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, and its remedy."""

    what: str
    remedy: str
    stops: bool = True  # False: the rest of mpoc works


@dataclass(frozen=True)
class SelfTestResult:
    """The result of the self-test on one device."""

    device: str
    seconds: float
    difference: float | None  # relative, of the network's outputs; None: the test failed


@dataclass
class Examination:
    """Packages, devices, memory and disk space of this machine, self-tests, and faults."""

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
        """The examination as ``--json`` prints it."""
        about = {"schema": SCHEMA, "well": self.is_well, "mpoc": mpoc.__version__, **where()}
        return about | asdict(self)


def where() -> dict[str, str]:
    """Where mpoc and Python are installed, and the operating system."""
    folder = Path(mpoc.__file__).parent
    return {"folder": str(folder), "python": sys.executable, "platform": platform.platform()}


def examine() -> Examination:
    """Check packages, disk and torch, then run the self-test on each device."""
    examination = Examination(cpus=usable_cpus())
    examination.memory, examination.memory_free = memory()
    _look_at_packages(examination)
    _look_at_disk(examination)
    _look_at_torch(examination)
    if examination.threads is not None:
        for device in ("cpu", *(device.name for device in examination.devices if device.is_used)):
            _test(examination, device)
    return examination


def _look_at_packages(examination: Examination) -> None:
    from importlib import metadata

    try:
        examination.packages = packages()
    except metadata.PackageNotFoundError:
        what = "mpoc runs from a folder and is not installed, so its requirements are not known"
        examination.faults.append(Fault(what, "pip install FOLDER", stops=False))
    for package in examination.packages:
        if package.is_right or (package.extra and package.version is None):
            continue
        has = f"{package.version} is outside {package.needs}" if package.version else "is not installed"
        extra = f", which the extra {package.extra} asks for" if package.extra else ""
        what = f"{package.name} {has}{extra}"
        examination.faults.append(Fault(what, package.remedy, stops=package.extra is None))


def _look_at_disk(examination: Examination) -> None:
    try:
        examination.disk_free = free_disk()
    except OSError as error:
        examination.faults.append(Fault(f"no temporary folder: {error}", _OTHER_FOLDER, stops=False))
    for folder, free in examination.disk_free.items():
        if free < _LITTLE_SPACE:
            what = f"{human_bytes(free)} free in {folder}"
            examination.faults.append(Fault(what, "free disk space, or write elsewhere with -o", stops=False))


def _look_at_torch(examination: Examination) -> None:
    try:
        import torch

        examination.devices, examination.why_no_device = devices()
        examination.threads = torch.get_num_threads()
    except (ImportError, OSError) as error:
        known = {package.name: package for package in examination.packages}
        if "torch" not in known or known["torch"].version is not None:  # else it is a fault already
            remedy = known["torch"].remedy if "torch" in known else "pip install torch"
            remedy = remedy.replace("install", "install --force-reinstall")
            examination.faults.append(Fault(f"torch cannot be imported: {_first_line(error)}", remedy))


def _test(examination: Examination, device: str) -> None:
    """Run the self-test in a temporary folder; any exception is a fault."""
    import tempfile

    start = time.perf_counter()
    difference: float | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="mpoc-doctor-") as folder:
            difference = self_test(device, Path(folder))
    except Exception as error:  # whatever it is, the user asked to see it
        what = f"self-test on {device}: {error.__class__.__name__}: {_first_line(error)}"
        examination.faults.append(Fault(what, _mend(error, device)))
    examination.trials.append(SelfTestResult(device, round(time.perf_counter() - start, 3), difference))


def _mend(error: Exception, device: str) -> str:
    if isinstance(error, OSError):
        return _OTHER_FOLDER
    if device != "cpu":
        return "--device cpu works around it; a torch built for this device: https://pytorch.org/get-started"
    return "reinstall torch and mpoc; if it persists, report what mpoc doctor --json prints"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def lines(examination: Examination) -> Iterator[tuple[str, str]]:
    """The lines of the report: title and text."""
    places = where()
    yield "mpoc", f"{mpoc.__version__} in {places['folder']}"
    for package in examination.packages:
        if package.extra is None:
            place = f" in {places['python']}" if package.name == PYTHON else ""
            yield package.name, f"{package.version or 'not installed'} (needs {package.needs}){place}"
    for extra in EXTRAS:
        there = [package for package in examination.packages if package.extra == extra]
        lacks = [package.name for package in there if package.version is None]
        has = ", ".join(f"{package.name} {package.version}" for package in there if package.version)
        if there:
            more = f"without {', '.join(lacks)}: {install(extra)}" if lacks else ""
            yield f"mpoc[{extra}]", "; ".join(filter(None, [has, more]))
    yield "platform", places["platform"]
    yield from _machine_lines(examination)
    for trial in examination.trials:
        how = "failed" if trial.difference is None else f"passed, outputs differ by {trial.difference:.1g}"
        yield "self-test", f"{trial.device}: {how} ({trial.seconds:.1f} s)"


def _machine_lines(examination: Examination) -> Iterator[tuple[str, str]]:
    uses = "" if examination.threads is None else f", of which torch uses {examination.threads}"
    yield "CPUs", f"{examination.cpus}{uses}"
    if examination.memory is not None:
        free = "" if examination.memory_free is None else f", {human_bytes(examination.memory_free)} free"
        yield "memory", human_bytes(examination.memory) + free
    for device in examination.devices:
        size = "" if device.memory is None else f", {human_bytes(device.memory)}"
        yield device.name, device.title + size + ("" if device.is_used else " (not used: no float64)")
    if not examination.devices and examination.threads is not None:
        yield "GPUs", "; ".join(["none", *examination.why_no_device])
    for folder, space in examination.disk_free.items():
        yield "disk", f"{human_bytes(space)} free in {folder}"


def self_test(device: str, folder: Path) -> float:
    """Compress, load and expand a small network on a device, and compare its outputs with the original's.

    The weights are random chains with the bond dimension that is asked for, so that compression loses
    nothing but rounding, while every stage runs: truncated SVD, writing, reading, contraction.

    Args:
        device: as ``--device`` takes it.
        folder: an empty one, for the files.

    Returns:
        ‖y − ŷ‖ / ‖y‖ of the network's outputs y (5, 24): the larger of cores and expanded weights.

    Raises:
        MpocError: outputs differ, or as :func:`mpoc.compression.pipeline.compress_checkpoint`.
    """
    import torch

    network = _network()
    torch.save(network.state_dict(), folder / "net.pt")
    inputs = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(inputs)
        outputs = _outputs(device, folder, inputs)
    difference = max(float((output - expected).norm() / expected.norm()) for output in outputs)
    if not difference <= TOLERANCE:  # NaN too
        raise MpocError(f"outputs differ by {difference:.2g} of their norm from the dense network's")
    return difference


def _outputs(device: str, folder: Path, inputs: Tensor) -> list[Tensor]:
    """Outputs through the cores, and through the weights that they are expanded to."""
    from safetensors.torch import load_file

    from mpoc.compression.expand import expand_checkpoint
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.recipe import make_recipe
    from mpoc.models.loading import load

    small, dense = folder / "net.mpo.safetensors", folder / "net.dense.safetensors"
    recipe = make_recipe(None, {"bond": _BOND, "shape": _SHAPES, "device": device})
    compression = compress_checkpoint(folder / "net.pt", small, recipe)
    if len(compression.manifest.replaced) != len(_SHAPES):
        raise MpocError(f"{len(compression.manifest.replaced)} of {len(_SHAPES)} layers were compressed")
    expand_checkpoint(small, dense)
    expanded = _network()
    expanded.load_state_dict(load_file(dense))
    networks = load(small, _network()), expanded
    return [network.to(device)(inputs.to(device)).cpu() for network in networks]


def _network() -> nn.Sequential:
    """A network from 4×4 images of four channels to 24 numbers; the same at every call."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    conv, first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(128, 32), nn.Linear(32, 24)
    network = nn.Sequential(conv, nn.Flatten(), first, nn.Tanh(), second).eval()
    state = network.state_dict()
    for rule in _SHAPES:
        weight, bias = state[f"{rule.pattern}.weight"], state[f"{rule.pattern}.bias"]
        weight.copy_(_chain(rule, weight[0, 0].numel(), generator).reshape(weight.shape))
        bias.normal_(0, 0.1, generator=generator)
    return network


def _chain(rule: ShapeRule, taps: int, generator: torch.Generator) -> Tensor:
    """A weight (outputs, inputs, taps) of two sites and one for the taps, whose bonds are ``_BOND``."""
    import torch

    (a, b), (c, d) = rule.output_factors, rule.input_factors
    shapes = (a, c), (b, d), (taps,)
    parts = (torch.randn(_BOND, *shape, generator=generator) for shape in shapes)
    weight = torch.einsum("rac,rbd,rt->abcdt", *parts)
    return weight / (weight.std() * math.sqrt(c * d * taps))


@dataclass(frozen=True)
class DoctorOptions:
    """The command line of ``mpoc doctor``."""

    as_json: bool = option("Print everything as JSON on stdout.", False, "--json")


@takes(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Show versions, extras and devices, and test mpoc on each device; takes seconds.

    The exit status is 1 where something stops mpoc from working. Each fault comes with its remedy.

    Example: mpoc doctor
    """
    from mpoc.reporting.summary import to_json

    examination = examine()
    console = Output()
    if options.as_json:
        sys.stdout.write(to_json(examination.as_dict()) + "\n")
    else:
        _print(examination, console)
    if not examination.is_well:
        raise SystemExit(1)


def _print(examination: Examination, console: Output) -> None:
    for title, text in lines(examination):
        console.result.print(f"{plain(f'{title:<12}')}{plain(text)}", soft_wrap=True)
    for fault in examination.faults:
        title, style = ("fault", "bold red") if fault.stops else ("note", "bold yellow")
        console.result.print(titled(title, f"{fault.what}: {fault.remedy}", style), soft_wrap=True)
    console.result.print("all is well" if examination.is_well else "mpoc does not work as it should here")
