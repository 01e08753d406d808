"""Compress an open source to one goal: fit its layers, keep each on disk, write the output from them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mpoc.compression.plain_fit import Fitted, fit_layer
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe
from mpoc.compression.resume import LayerCache, in_order_key, layer_key
from mpoc.compression.run_context import RunContext
from mpoc.compression.size_prediction import (
    LONGEST_FIGURE,
    halved_beside,
    make_manifest,
    predict_weight_bytes,
)
from mpoc.compression.source import CompressionSource
from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.atomic import write_text
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.coded_parts import halved_entry
from mpoc.io.manifest import MANIFEST_FILE, LayerRecord, Manifest
from mpoc.io.open_checkpoint import one_ahead
from mpoc.io.safetensors_writer import Entry, plan_shards, replace_metadata, write_safetensors
from mpoc.io.training_history import Measured
from mpoc.io.weight_files import output_bytes
from mpoc.reporting.summary import Report
from mpoc.runtime.distributed import ProcessGroup

if TYPE_CHECKING:
    from mpoc.compression.calibrate.sequential import SequentialFit
    from mpoc.compression.calibrate.statistics import CalibrationStatistics
    from mpoc.train.evaluate_file import FileEvaluation


@dataclass
class Compression:
    """The result of a compression, or of a dry run."""

    manifest: Manifest
    output: Path
    nbytes: int  # of the output on disk; predicted, an upper bound, where nothing was written
    written: bool
    seconds: dict[str, float] = field(default_factory=dict)  # layer name → time of its fit
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> Report:
        """The report of the output."""
        return Report(self.manifest, self.nbytes, self.seconds)


@dataclass(frozen=True)
class Job:
    """A source with the plans for one goal, ready to be fitted."""

    source: CompressionSource
    recipe: Recipe
    plans: list[LayerPlan]
    context: RunContext
    statistics: CalibrationStatistics | None = None
    calibrated: SequentialFit | None = None  # None: layers are fitted to their weights alone

    def fits(self, kept: Mapping[str, Callable[[], Fitted]] | None = None) -> Iterator[Fitted]:
        """Fit all layers, but for those kept of an earlier run."""
        if self.calibrated is not None:
            return self.calibrated.fit(self.plans, kept)
        return self._plain_fits([plan for plan in self.plans if plan.map.name not in (kept or {})])

    def _plain_fits(self, plans: list[LayerPlan]) -> Iterator[Fitted]:
        checkpoint, read = self.source.checkpoint, [plan.map.name for plan in plans if not plan.is_unchanged]
        with closing(one_ahead(checkpoint, read)) as ahead:
            for plan in plans:
                if not plan.is_unchanged:
                    next(ahead)
                yield fit_layer(checkpoint, plan, self.recipe, self.context.device)

    def finish(self) -> dict[str, Tensor]:
        """After the last layer, the changed tensors that belong to no single layer, by name."""
        return self.calibrated.finish() if self.calibrated else {}

    def manifest(self, records: list[LayerRecord]) -> Manifest:
        """The manifest of the output with these layers; scores follow once it is measured."""
        made = make_manifest(self.source.checkpoint, self.source.selection, self.recipe, records)
        return replace(made, calibration=self.calibrated.facts() if self.calibrated else {}, measured={})

    @property
    def notes(self) -> list[str]:
        """Notes on the source and on the fit for the user."""
        return [*self.source.notes, *(self.calibrated.notes if self.calibrated else ())]


def make_job(
    source: CompressionSource,
    recipe: Recipe,
    plans: list[LayerPlan],
    context: RunContext,
    statistics: CalibrationStatistics | None = None,
) -> Job:
    """Prepare the compression to one goal; with statistics, the budget is allocated by them.

    Args:
        source: to be compressed.
        recipe: the recipe that the plans were made by.
        plans: from :meth:`mpoc.compression.source.CompressionSource.plan`.
        context: the device, and the processes that share the work.
        statistics: calibration statistics; None: fit to the weights alone.
    """
    if statistics is None:
        return Job(source, recipe, plans, context)
    from mpoc.compression.calibrate.sequential import SequentialFit

    with context.group.all_or_raise():
        calibrated = SequentialFit(statistics, source.checkpoint, recipe)
    predict = partial(predict_weight_bytes, source.checkpoint, source.selection, recipe)
    plans = calibrated.allocate(plans, predict)
    return Job(source, recipe, plans, context, statistics, calibrated)


def write_compressed(
    job: Job, target: Path, folder: Path | None = None, resumes: bool = False
) -> Compression:
    """Fit the layers and write file or directory.

    Args:
        job: the job to carry out.
        target: a path that does not exist yet.
        folder: folder of finished layers, which the caller removes; None: a new one beside ``target``.
        resumes: reuse the layers in ``folder``.

    Raises:
        MpocError: a weight cannot be fitted, or no layer would shrink.
        OSError: reading or writing failed (a full disk).
    """
    if folder is None:
        folder = target.with_name(f"{target.name}.layers")
        folder.mkdir()
    group = job.context.group
    finished = LayerCache(folder, _keys(job) if resumes else None)
    _fit(job, finished)
    with group.all_or_raise():
        layers = [finished.layer(number) for number in range(len(job.plans))]
        fitted = {
            name: tensor for layer in layers for name, tensor in layer.entries.items()
        } | finished.others()
        manifest = job.manifest([layer.record for layer in layers])
        _refuse_nothing_gained(manifest)
    entries = _entries(job, fitted, manifest)
    _write(target, job.source.checkpoint, entries, manifest, job.recipe.max_shard_size, group)
    with group.all_or_raise():
        nbytes = output_bytes(target)
    times = {layer.record.name: layer.seconds for layer in layers}
    return Compression(manifest, target, nbytes, True, times, job.notes)


def scores_record(before: FileEvaluation, after: FileEvaluation | None = None) -> Measured:
    """What an output records of its evaluation; without ``after``, figures have their most digits."""
    return Measured(
        data=before.data,
        split=before.split,
        examples=before.examples,
        metric=before.metric,
        before=_finite(before.scores),
        after=_finite(dict.fromkeys(before.scores, LONGEST_FIGURE) if after is None else after.scores),
    )


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def record_scores(compression: Compression, measured: Measured) -> Compression:
    """Have the output record its evaluation; its tensors stay."""
    output, manifest = compression.output, replace(compression.manifest, measured=measured)
    if output.is_dir():
        write_text(output / MANIFEST_FILE, manifest.to_json(indent=1) + "\n")
    else:
        replace_metadata(output, {"mpoc": manifest.to_json()})
    return replace(compression, manifest=manifest, nbytes=output_bytes(output))


def _fit(job: Job, finished: LayerCache) -> None:
    """Fit all layers, and keep what belongs to no single layer."""
    group = job.context.group
    with group.all_or_raise():
        if group.is_main:
            finished.clear(len(job.plans))
    if job.calibrated:
        _fit_together(job, job.calibrated, finished)
    else:
        _fit_shared(job, finished)
    others = job.finish()
    with group.all_or_raise():
        if group.is_main:
            finished.keep_others(others)


def _fit_shared(job: Job, finished: LayerCache) -> None:
    """Each process fits its share of the layers by their weights alone, but for what is finished."""
    group, plans = job.context.group, job.plans
    with group.all_or_raise():
        mine = group.own_indices([plan.cost for plan in plans])
        todo = {plans[k].map.name: k for k in mine if not finished.takes_up(k)}
        asked = replace(job, plans=[plan for plan in plans if plan.map.name in todo])
    with group.all_or_raise():
        _log_finished(finished.count(), job)

    def keep(fitted: Fitted, seconds: float) -> int:
        finished.keep(todo[fitted.record.name], fitted, seconds)
        return finished.count()

    costs = {plan.map.name: plan.cost for plan in asked.plans}
    with group.all_or_raise():
        fit_all(asked.fits(), costs, len(plans), keep, job.context)


def _log_finished(count: int, job: Job) -> None:
    if count:
        job.context.log("resuming; layers already done:", count, len(job.plans))


def _fit_together(job: Job, calibrated: SequentialFit, finished: LayerCache) -> None:
    """Fit the layers that are not finished in order, each by all processes together."""
    group, plans = job.context.group, job.plans
    numbers = {plan.map.name: k for k, plan in enumerate(plans)}
    usable = group.on_main(lambda: {name for name, k in numbers.items() if finished.takes_up(k)})
    reused = {name for unit in calibrated.schedule.units(plans) if usable.issuperset(unit) for name in unit}
    costs = {name: cost for name, cost in calibrated.schedule.costs(plans).items() if name not in reused}
    _log_finished(len(reused), job)

    def keep(fitted: Fitted, seconds: float) -> int:
        with group.all_or_raise():
            if group.is_main:
                finished.keep(numbers[fitted.record.name], fitted, seconds)
        return next(count)

    count = itertools.count(len(reused) + 1)
    kept = {name: partial(finished.fitted, number) for name, number in numbers.items() if name in reused}
    fit_all(job.fits(kept), costs, len(plans), keep, job.context)


def _keys(job: Job) -> Callable[[int], str]:
    """The key of each layer; in a sequential fit it covers what is known of all layers."""
    checkpoint, plans, recipe = job.source.checkpoint, job.plans, job.recipe
    if job.statistics is not None:  # the processes find its fingerprint together
        return partial(in_order_key, job.statistics.fingerprint, checkpoint, plans, recipe)
    return lambda number: layer_key(checkpoint, plans[number], recipe, job.context.device)


def fit_all(
    fits: Iterator[Fitted],
    costs: Mapping[str, float],
    total: int,
    keep: Callable[[Fitted, float], int],
    context: RunContext,
) -> None:
    """Layer by layer: ``keep`` takes one and its seconds, and returns how many of ``total`` are finished."""
    spent, start = 0.0, time.perf_counter()
    for fitted in fits:
        seconds = time.perf_counter() - start
        number = keep(fitted, seconds)
        spent += costs[fitted.record.name]
        if context.progress.layer is not None:
            share = spent / (sum(costs.values()) or 1.0)
            context.progress.layer(fitted.record, seconds, number, total, share)
        start = time.perf_counter()


def _refuse_nothing_gained(manifest: Manifest) -> None:
    if not manifest.changed:
        first = manifest.layers[0]
        hint = "a smaller --bond, a larger --max-error or --discard, other --layers; --dry-run shows the plan"
        if any(goal in manifest.options for goal in ("ratio", "size")):
            hint = "a smaller --ratio or --size, or other --layers; --dry-run shows the plan"
        raise MpocError(
            f"no layer would be compressed, so nothing was written ({first.layer}: {first.reason})", hint
        )


def _entries(job: Job, fitted: dict[str, list[Entry]], manifest: Manifest) -> list[Entry]:
    """All tensors of the output in the source's order; cores or codes replace their weight."""
    checkpoint = job.source.checkpoint
    halved = halved_beside(job.source.selection, job.recipe, manifest.layers)
    entries: list[Entry] = []
    for name, info in checkpoint.infos.items():
        kept = Entry(info, lambda name=name: checkpoint.read(name))  # type: ignore[misc]
        own = fitted.get(name, [kept])
        entries += map(halved_entry, own) if name in halved else own
    return entries


def _write(
    target: Path,
    checkpoint: Checkpoint,
    entries: list[Entry],
    manifest: Manifest,
    max_shard_size: int,
    group: ProcessGroup,
) -> None:
    """Write one file in the main process, or shards in all processes."""
    if not checkpoint.is_directory:
        with group.all_or_raise():
            if group.is_main:
                metadata = checkpoint.own_metadata | {"mpoc": manifest.to_json()}
                write_safetensors(target, entries, metadata)
        return
    shards = plan_shards(entries, max_shard_size, checkpoint.stem)
    with group.all_or_raise():
        if group.is_main:
            target.mkdir()
            hub_directory.copy_other_files(checkpoint.path, target, checkpoint.weight_files)
    with group.all_or_raise():
        for number in group.own_indices(
            [sum(entry.info.nbytes for entry in shard.entries) for shard in shards]
        ):
            hub_directory.write_shard(target, shards[number], checkpoint)
    with group.all_or_raise():
        if group.is_main:
            hub_directory.write_index(target, shards, checkpoint)
            hub_directory.mark_compressed(target, manifest)
