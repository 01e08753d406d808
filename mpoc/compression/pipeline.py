"""Compress a checkpoint on disk: checkpoint → selection → plan → fit → form → writer → report."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import mpoc
from mpoc.compression.plain_fit import Fitted
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe, check_recipe
from mpoc.compression.resume import calibration_folder, layers_folder, resume_directory
from mpoc.compression.run_context import Progress, RunContext
from mpoc.compression.size_prediction import predict_size
from mpoc.compression.source import CompressionSource, open_to_calibrate
from mpoc.compression.write import Compression, Job, fit_all, make_job, write_compressed
from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import refuse_existing, refuse_misnamed
from mpoc.io.keyed_store import scratch_folder
from mpoc.io.training_history import Measured
from mpoc.runtime.device import choose_device
from mpoc.runtime.distributed import process_group
from mpoc.runtime.formatting import human_bytes

if TYPE_CHECKING:
    from mpoc.compression.calibrate.block_refinement import Schedule
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest
    from mpoc.compression.calibrate.statistics import CalibrationStatistics

_MATRICES = 12  # of a layer's wider side, in float64, that its fit and the routines it calls take at a time


def default_output(source: Path) -> Path:
    """``model.pt`` → ``model.mpo.safetensors``, ``bert/`` → ``bert-mpo``; in the current directory."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    return Path(f"{source.name}-mpo" if source.is_dir() else f"{source.stem}.mpo.safetensors")


def refuse_output(source: Path, output: Path, force: bool) -> None:
    """Check, before any work, that a compression of ``source`` may be written to ``output``.

    Raises:
        UsageError: ``output`` exists without ``force``, is the source, or has the suffix of another kind.
        MpocError: the directory of ``output`` does not exist or cannot be written.
    """
    if source.exists():
        refuse_existing(output, source, force)
        refuse_misnamed(output, source)


def compress_checkpoint(
    source: str | PathLike[str],
    output: str | PathLike[str],
    recipe: Recipe,
    *,
    calibrate: CalibrationRequest | str | PathLike[str] | None = None,
    arch: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> Compression:
    """Compress a checkpoint on disk; all processes that torchrun started share the work.

        >>> recipe = mpoc.Recipe(bond=8, exclude=("conv1",))
        >>> compression = mpoc.compress_checkpoint("digits-cnn.pt", "digits.mpo.safetensors", recipe)
        >>> [layer.layer for layer in compression.report.replaced]
        ['conv2', 'fc1', 'fc2']

    Args:
        source: a file or directory; it is only read.
        output: a file or directory, like the source.
        recipe: the options.
        calibrate: path of the calibration data, ``"self"`` for data made for the network, or a request; None:
            fit to the weights alone.
        arch: the checkpoint's network, as :func:`mpoc.models.architecture.make_network` takes it. It says
            what kinds of layers there are, and is recorded.
        force: replace an existing output.
        dry_run: write nothing. Layers are still factorised where a spectrum decides the bonds.
        resume: keep finished layers in ``OUT.partial`` until the output is written, and reuse those that are
            there; with ``force``, layers of other work are removed.
        progress: called after each layer, and during calibration.
        measured: scores for which the output leaves room; :func:`mpoc.compression.write.record_scores`
            writes them.

    Raises:
        UsageError: ``arch`` does not fit the checkpoint, calibration has no network, or the recipe has a
            ``max_drop``, which :func:`mpoc.compression.search.compress_within` takes.
        MpocError: the input is damaged, or no layer can be compressed.
        OSError: reading or writing failed.
    """
    source, output = Path(source), Path(output)
    check_recipe(recipe)
    if recipe.max_drop is not None:
        raise UsageError(
            "max_drop: compress_checkpoint does not search for a budget",
            "mpoc.compression.search.compress_within",
        )
    with process_group() as group, in_scratch(as_request(calibrate), None if dry_run else output) as request:
        with group.all_or_raise():
            if not dry_run:
                refuse_output(source, output, force)
            device = choose_device(recipe.device)
            context = RunContext(device, group, progress or Progress(), fits_once=not dry_run)
            opened = open_to_calibrate(source, recipe, arch, request).with_scores(measured or {})
            request = opened.request
            plans = opened.plan(opened.recipe, request is not None and request.refine)
        if dry_run:
            return _dry_run(_job(opened, plans, context, request), output)
        options = _options(opened, source, request) if resume else None
        with resume_directory(output, group, options, force) as target:
            if request is not None and resume:
                request = replace(request, folder=calibration_folder(target))
            job = _job(opened, plans, context, request)
            compression = write_compressed(job, target, layers_folder(target), resume)
    return replace(compression, output=output)


def as_request(calibrate: CalibrationRequest | str | PathLike[str] | None) -> CalibrationRequest | None:
    """The calibration request for a data set at a path, or for ``"self"``."""
    if calibrate is None:
        return None
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest, named_data

    if isinstance(calibrate, CalibrationRequest):
        return calibrate
    return CalibrationRequest(named_data(calibrate))


@contextmanager
def in_scratch(
    request: CalibrationRequest | None, output: Path | None
) -> Iterator[CalibrationRequest | None]:
    """The request with a scratch folder of its own, removed at the end: where it asks, or beside the output.

    Args:
        request: None: there is none to be had.
        output: None: nothing is written.  Memory then holds all, unless a folder is asked for; so it does
            where no folder can be made beside the output.
    """
    asked = None if request is None else request.scratch
    parent = asked or (None if output is None else output.resolve().parent)
    if request is None or parent is None:
        yield request
        return
    with ExitStack() as entered:
        folder: Path | None = None
        try:
            folder = entered.enter_context(scratch_folder(parent))
        except (MpocError, OSError):
            if asked is not None:
                raise
        required = asked is not None
        yield request if folder is None else replace(request, scratch=folder, scratch_required=required)


def _job(
    opened: CompressionSource, plans: list[LayerPlan], context: RunContext, request: CalibrationRequest | None
) -> Job:
    statistics = None if request is None else opened.statistics(request, context)
    return make_job(opened, opened.recipe, plans, context, statistics)


def _options(
    opened: CompressionSource, source: Path, calibration: CalibrationRequest | None
) -> dict[str, str]:
    """The options that finished layers depend on; the contents of files are checked elsewhere."""
    recipe = opened.recipe
    options = {f"--{f.name.replace('_', '-')}": str(getattr(recipe, f.name)) for f in fields(recipe)}
    del options["--max-shard-size"]
    data = ""
    if calibration is not None and isinstance(calibration.data, Path | str):
        of = calibration.data.resolve() if isinstance(calibration.data, Path) else calibration.data
        data = f"{of}, {calibration.samples} examples"
    described = {"MODEL": str(source.resolve()), "--arch": str(opened.arch), "--calibrate": data, **options}
    described["--refine"] = str(calibration is not None and calibration.refine)
    return described | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "mpoc": mpoc.__version__}


def _dry_run(job: Job, output: Path) -> Compression:
    """The compression without writing; layers are factorised where a spectrum decides the bonds."""
    records = {plan.map.name: plan.record() for plan in job.plans}
    times: dict[str, float] = {}

    def keep(fitted: Fitted, seconds: float) -> int:
        records[fitted.record.name], times[fitted.record.name] = fitted.record, seconds
        return len(times)

    fitted = any(plan.is_open for plan in job.plans)
    if fitted:
        costs = {plan.map.name: plan.cost for plan in job.plans}
        plain = replace(job, calibrated=None)
        fit_all(plain.fits(), costs, len(job.plans), keep, job.context)
    layers = list(records.values())
    manifest, opened, notes = job.manifest(layers), job.source, job.notes
    facts = job.calibrated.longest_facts() if job.calibrated else None
    known = layers if fitted else None
    nbytes = predict_size(opened.checkpoint, opened.selection, job.recipe, job.plans, known, facts)
    if job.calibrated and job.statistics:
        notes.append(estimate(job.statistics, job.calibrated.schedule, job.plans).note)
    if not manifest.changed:
        notes.append("no layer would be compressed: without --dry-run this ends with an error")
    return Compression(manifest, output, nbytes, False, times, notes)


@dataclass(frozen=True)
class Estimate:
    """What the fits of a calibrated compression will need."""

    seconds: float
    memory: int  # bytes, the largest of the whole run
    scratch: int  # bytes of its files beside the output, or in the folder of --scratch

    @property
    def note(self) -> str:
        """One line for the user."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"the fits would take about {minutes}:{seconds:02d} minutes; the run about "
            f"{human_bytes(self.memory)} of memory and up to {human_bytes(self.scratch)} of files meanwhile"
        )


def estimate(statistics: CalibrationStatistics, schedule: Schedule, plans: Sequence[LayerPlan]) -> Estimate:
    """Estimate what the fits of these plans need, once the dense network was measured."""
    seconds = sum(schedule.costs(plans).values())
    shapes = (plan.structure.as_low_rank() for plan in plans if plan.map.name in schedule.observed)
    widest = max(
        (max(one.outputs, one.lead * one.inputs) for one in shapes if one.kind != "embedding"), default=0
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak += _MATRICES * 8 * widest**2
    if not statistics.scratch.is_required:  # memory held what the run will have in files
        peak -= statistics.scratch.nbytes
    found = sum(4 * plan.structure.num_original for plan in plans)  # the compressed network's own weights
    return Estimate(seconds, peak, statistics.scratch_bytes + found)
