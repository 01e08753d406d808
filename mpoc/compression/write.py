"""One compression of a source that is open: its layers fitted and kept, then the output written from them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.compression.plain_fit import Fitted, fit_layer
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe
from mpoc.compression.resume import LayerCache, in_order_key, layer_key
from mpoc.compression.size_prediction import make_manifest, predict_size
from mpoc.compression.source import CompressionSource
from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.open_checkpoint import one_ahead
from mpoc.io.safetensors_writer import Entry, plan_shards, write_safetensors
from mpoc.io.weight_files import output_bytes
from mpoc.reporting.summary import Report
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

if TYPE_CHECKING:
    from mpoc.compression.calibrate.dense_pass import StageCallback
    from mpoc.compression.calibrate.sequential import SequentialFit
    from mpoc.compression.calibrate.statistics import CalibrationStatistics


# record, seconds, layers done, layers in all, part of the work done
ProgressCallback = Callable[[LayerRecord, float, int, int, float], None]


@dataclass
class Compression:
    """What a compression did, or (dry run) would do."""

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
class WorkContext:
    """Where and by whom layers are fitted, and who is told."""

    group: ProcessGroup
    folder: Path  # of finished layers, for the caller to remove
    resumes: bool = False  # and whether those that are there are used again
    progress: ProgressCallback | None = None
    tell: StageCallback | None = None  # of what goes on before layers are fitted

    @staticmethod
    def beside(target: Path, progress: ProgressCallback | None = None) -> WorkContext:
        """Of one process, in a new folder beside ``target``."""
        folder = target.with_name(f"{target.name}.layers")
        folder.mkdir()
        return WorkContext(SINGLE_PROCESS, folder, progress=progress)


def write_compressed(
    opened: CompressionSource,
    target: Path,
    recipe: Recipe,
    plans: list[LayerPlan],
    study: CalibrationStatistics | None,
    work: WorkContext,
) -> Compression:
    """Fit the layers and write file or directory.

    Args:
        opened: the source.
        target: does not exist.
        recipe: that of the plans.
        plans: of :meth:`mpoc.compression.source.CompressionSource.plan`.
        study: of calibration data; None: weights alone count.
        work: by whom and where.

    Raises:
        MpocError: a weight that cannot be fitted, or nothing that would shrink.
        OSError: of reading or writing (a full disk).
    """
    calibrated, plans = shared_out(opened, recipe, plans, study)
    finished = LayerCache(work.folder, _keys(opened, recipe, plans, study) if work.resumes else None)
    _fit(opened, recipe, plans, calibrated, finished, work)
    with work.group.all_or_raise():
        layers = [finished.layer(number) for number in range(len(plans))]
        entries = {name: one for layer in layers for name, one in layer.entries.items()} | finished.others()
        records = [layer.record for layer in layers]
        manifest = make_manifest(opened.checkpoint, opened.selection, recipe, records)
        manifest = replace(manifest, calibration=calibrated.facts() if calibrated else {})
        _refuse_nothing_gained(manifest)
    entries_of_all = _entries(opened.checkpoint, entries)
    _write(target, opened.checkpoint, entries_of_all, manifest, recipe.max_shard_size, work.group)
    with work.group.all_or_raise():
        nbytes = output_bytes(target)
    notes = [*opened.notes, *(calibrated.notes if calibrated else ())]
    times = {layer.record.name: layer.seconds for layer in layers}
    return Compression(manifest, target, nbytes, True, times, notes)


def _fit(
    opened: CompressionSource,
    recipe: Recipe,
    plans: list[LayerPlan],
    calibrated: SequentialFit | None,
    finished: LayerCache,
    work: WorkContext,
) -> None:
    """Until all layers, and what goes with none of them, are finished."""
    with work.group.all_or_raise():
        if work.group.is_main:
            finished.clear(len(plans))
    if calibrated:
        _fit_in_order(calibrated, plans, finished, work)
    else:
        _fit_shared(opened, recipe, plans, finished, work)
    others = calibrated.finish() if calibrated else {}
    with work.group.all_or_raise():
        if work.group.is_main:
            finished.keep_others(others)


def _fit_shared(
    opened: CompressionSource, recipe: Recipe, plans: list[LayerPlan], finished: LayerCache, work: WorkContext
) -> None:
    """Each process fits its share by weights alone, but for what is finished."""
    with work.group.all_or_raise():
        mine = work.group.own_indices([plan.cost for plan in plans])
        todo = {plans[k].map.name: k for k in mine if not finished.takes_up(k)}
        asked = [plan for plan in plans if plan.map.name in todo]
    with work.group.all_or_raise():
        _tell_finished(finished.count(), len(plans), work)

    def keep(fitted: Fitted, seconds: float) -> int:
        finished.keep(todo[fitted.record.name], fitted, seconds)
        return finished.count()

    costs = {plan.map.name: plan.cost for plan in asked}
    with work.group.all_or_raise():
        fit_all(fit_each(opened, asked, recipe), costs, len(plans), keep, work.progress)


def _tell_finished(count: int, total: int, work: WorkContext) -> None:
    if count and work.tell:
        work.tell("going on: layers finished before:", count, total)


def _fit_in_order(
    calibrated: SequentialFit, plans: list[LayerPlan], finished: LayerCache, work: WorkContext
) -> None:
    """All processes fit each layer together, but for what is finished."""
    numbers = {plan.map.name: k for k, plan in enumerate(plans)}
    usable = work.group.on_main(lambda: {name for name, k in numbers.items() if finished.takes_up(k)})
    done = {name for unit in calibrated.steps.units(plans) if usable.issuperset(unit) for name in unit}
    costs = {name: cost for name, cost in calibrated.steps.costs(plans).items() if name not in done}
    _tell_finished(len(done), len(plans), work)

    def keep(fitted: Fitted, seconds: float) -> int:
        with work.group.all_or_raise():
            if work.group.is_main:
                finished.keep(numbers[fitted.record.name], fitted, seconds)
        return next(count)

    count = itertools.count(len(done) + 1)
    kept = {name: partial(finished.fitted, number) for name, number in numbers.items() if name in done}
    fit_all(calibrated.fit(plans, kept), costs, len(plans), keep, work.progress)


def _keys(
    opened: CompressionSource, recipe: Recipe, plans: list[LayerPlan], study: CalibrationStatistics | None
) -> Callable[[int], str]:
    """What says what each layer depends on; where they are fitted in order, on all that is known of all."""
    if study is not None:  # the processes find its fingerprint together
        return partial(in_order_key, study.fingerprint, opened.checkpoint, plans, recipe)
    return lambda number: layer_key(opened.checkpoint, plans[number], recipe, opened.device)


def shared_out(
    opened: CompressionSource, recipe: Recipe, plans: list[LayerPlan], study: CalibrationStatistics | None
) -> tuple[SequentialFit | None, list[LayerPlan]]:
    """The calibrated fit, and plans with the budget as it shares it out; the plans as they are without."""
    if study is None:
        return None, plans
    from mpoc.compression.calibrate.sequential import SequentialFit

    with study.processes.all_or_raise():
        calibrated = SequentialFit(study, opened.checkpoint, recipe, opened.device)
    predict = partial(predict_size, opened.checkpoint, opened.selection, recipe)
    return calibrated, calibrated.share(plans, predict)


def fit_each(opened: CompressionSource, plans: list[LayerPlan], recipe: Recipe) -> Iterator[Fitted]:
    """Layers by their weights alone, each when its turn comes."""
    read = [plan.map.name for plan in plans if not plan.is_dense]
    with closing(one_ahead(opened.checkpoint, read)) as ahead:
        for plan in plans:
            if not plan.is_dense:
                next(ahead)
            yield fit_layer(opened.checkpoint, plan, recipe, opened.device)


def fit_all(
    fits: Iterator[Fitted],
    costs: Mapping[str, float],
    total: int,
    keep: Callable[[Fitted, float], int],
    progress: ProgressCallback | None,
) -> None:
    """Layer by layer: ``keep`` takes one and its seconds, and says how many of ``total`` are finished."""
    done, start = 0.0, time.perf_counter()
    for fitted in fits:
        seconds = time.perf_counter() - start
        number = keep(fitted, seconds)
        done += costs[fitted.record.name]
        if progress:
            progress(fitted.record, seconds, number, total, done / (sum(costs.values()) or 1.0))
        start = time.perf_counter()


def _refuse_nothing_gained(manifest: Manifest) -> None:
    if not manifest.replaced:
        first = manifest.layers[0]
        hint = "a smaller --bond, a larger --max-error or --discard, other --layers; --dry-run shows the plan"
        if any(goal in manifest.options for goal in ("ratio", "size")):
            hint = "a smaller --ratio or --size, or other --layers; --dry-run shows the plan"
        raise MpocError(
            f"no layer would be compressed, so nothing was written ({first.layer}: {first.reason})", hint
        )


def _entries(checkpoint: Checkpoint, fitted: dict[str, list[Entry]]) -> list[Entry]:
    """All tensors of the output in the source's order, what was fitted in the place of its tensor."""
    entries: list[Entry] = []
    for name, info in checkpoint.infos.items():
        kept = Entry(info, lambda name=name: checkpoint.read(name))  # type: ignore[misc]
        entries += fitted.get(name, [kept])
    return entries


def _write(
    target: Path,
    checkpoint: Checkpoint,
    entries: list[Entry],
    manifest: Manifest,
    max_shard_size: int,
    group: ProcessGroup,
) -> None:
    """One file, by the first process; or shards, shared out among all."""
    if not checkpoint.is_directory:
        with group.all_or_raise():
            if group.is_main:
                write_safetensors(target, entries, {"format": "pt", "mpoc": manifest.to_json()})
        return
    shards = plan_shards(entries, max_shard_size)
    with group.all_or_raise():
        if group.is_main:
            target.mkdir()
            hub_directory.copy_other_files(checkpoint.path, target, checkpoint.weight_files)
    with group.all_or_raise():
        for number in group.own_indices(
            [sum(entry.info.nbytes for entry in shard.entries) for shard in shards]
        ):
            hub_directory.write_shard(target, shards[number])
    with group.all_or_raise():
        if group.is_main:
            hub_directory.write_index(target, shards)
            hub_directory.mark_compressed(target, manifest)
