"""The orchestrator: checkpoint → selection → plan → fit → form → writer → report, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpoc import hub_directory
from mpoc.checkpoint import Checkpoint
from mpoc.errors import MpocError, UsageError
from mpoc.fitting import Fitted, fit_layer
from mpoc.manifest import LayerRecord, Manifest
from mpoc.opened import Opened, open_source
from mpoc.outline import make_manifest, predict_size
from mpoc.plan import LayerPlan
from mpoc.recipe import Recipe
from mpoc.report import output_bytes
from mpoc.writer import Entry, Spool, plan_shards, refuse_existing, refuse_misnamed, staged, write_safetensors

if TYPE_CHECKING:
    from mpoc.calibrate.dense import Tell
    from mpoc.calibrate.in_order import InOrder
    from mpoc.calibrate.study import CalibrationRequest, Study

Progress = Callable[[LayerRecord, float, int, int], None]  # record, seconds, layers done, layers in all


@dataclass
class Compression:
    """What a compression did, or (dry run) would do."""

    manifest: Manifest
    output: Path
    nbytes: int  # of the output on disk; predicted, an upper bound, where nothing was written
    written: bool
    seconds: dict[str, float] = field(default_factory=dict)  # layer name → time of its fit
    notes: list[str] = field(default_factory=list)


def default_output(source: Path) -> Path:
    """``model.pt`` → ``model.mpo.safetensors``, ``bert/`` → ``bert-mpo``; in the current directory."""
    source = source.resolve() if source.name in ("", ".", "..") else source
    return Path(f"{source.name}-mpo" if source.is_dir() else f"{source.stem}.mpo.safetensors")


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        UsageError: unknown or not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not available here", "--device auto") from error
    return device


def refuse_output(source: Path, output: Path, force: bool) -> None:
    """Check, before any work, that what is made of ``source`` may be written to ``output``.

    Raises:
        UsageError: it exists and ``force`` is not given, is the source, or is not named like its kind.
        MpocError: its directory does not exist or cannot be written.
    """
    if source.exists():
        refuse_existing(output, source, force)
        refuse_misnamed(output, source)


def compress_checkpoint(
    source: Path,
    output: Path,
    recipe: Recipe,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    arch: str | None = None,
    calibration: CalibrationRequest | None = None,
    tell: Tell | None = None,
) -> Compression:
    """Compress a checkpoint on disk.

    Args:
        source: file or directory; only read.
        output: file (single-file source) or directory.
        recipe: what to do.
        force: replace an existing output.
        dry_run: write nothing. Bonds under a tolerance are still found by factorising.
        progress: called after each layer.
        arch: the network that the checkpoint belongs to, as :func:`mpoc.architecture.make_network` takes it;
            it tells kinds of layers and is recorded.
        calibration: data to fit what the layers do on; None: their weights alone count.
        tell: called as calibration goes on, before layers are fitted.

    Raises:
        UsageError: ``arch`` makes no network, or one with other tensors; calibration needs a network and
            none is known; or a ``max_drop``, which :func:`mpoc.search.compress_within` is for.
        MpocError: bad input, or nothing that can be done; see its message and hint.
        OSError: of reading or writing (a full disk).
    """
    if recipe.max_drop is not None:
        raise UsageError("max_drop: files are measured to find its ratio", "mpoc.search.compress_within")
    if not dry_run:
        refuse_output(source, output, force)
    opened = open_source(source, recipe, arch, calibration is not None, choose_device(recipe.device))
    plans = opened.plan(opened.recipe)
    study = None if calibration is None else opened.study(calibration, tell)
    if dry_run:
        return _dry_run(opened, plans, study, output, progress)
    with staged(output) as target:
        done = write_compressed(opened, target, opened.recipe, plans, study, progress)
    return replace(done, output=output)


def write_compressed(
    opened: Opened,
    target: Path,
    recipe: Recipe,
    plans: list[LayerPlan],
    study: Study | None = None,
    progress: Progress | None = None,
) -> Compression:
    """Fit the layers and write file or directory.

    Args:
        opened: the source.
        target: does not exist; what is spooled beside it stays for the caller to remove.
        recipe: that of the plans.
        plans: of :meth:`mpoc.opened.Opened.plan`.
        study: of calibration data; None: weights alone count.
        progress: called after each layer.

    Raises:
        MpocError: a weight that cannot be fitted, or nothing that would shrink.
        OSError: of reading or writing (a full disk).
    """
    checkpoint = opened.checkpoint
    calibrated, plans = _shared(opened, recipe, plans, study)
    spool = Spool(target.with_name(f"{target.name}.cores"))
    try:
        fits = calibrated.fit(plans) if calibrated else _fit_each(opened, plans, recipe)
        records, seconds, fitted = _collect(fits, [plan.map.name for plan in plans], spool, progress)
        last = calibrated.finish() if calibrated else {}
        fitted |= {name: [spool.add(name, tensor)] for name, tensor in last.items()}
        manifest = make_manifest(checkpoint, opened.selection, recipe, records)
        manifest = replace(manifest, calibration=calibrated.facts() if calibrated else {})
        _refuse_nothing_gained(manifest)
        entries = _entries(checkpoint, fitted)
        _write(target, checkpoint, entries, manifest, recipe.max_shard_size)
    finally:
        spool.close()
    notes = [*opened.notes, *(calibrated.notes if calibrated else ())]
    return Compression(manifest, target, output_bytes(target), True, seconds, notes)


def _shared(
    opened: Opened, recipe: Recipe, plans: list[LayerPlan], study: Study | None
) -> tuple[InOrder | None, list[LayerPlan]]:
    """The calibrated fit, and plans with the budget as it shares it out; the plans as they are without."""
    if study is None:
        return None, plans
    from mpoc.calibrate.in_order import InOrder

    calibrated = InOrder(study, opened.checkpoint, recipe, opened.device)
    predict = partial(predict_size, opened.checkpoint, opened.selection, recipe)
    return calibrated, calibrated.share(plans, predict)


def _dry_run(
    opened: Opened,
    plans: list[LayerPlan],
    study: Study | None,
    output: Path,
    progress: Progress | None,
) -> Compression:
    """What would be done; under a tolerance the bonds are found by factorising."""
    recipe = opened.recipe
    calibrated, plans = _shared(opened, recipe, plans, study)
    records = [plan.record() for plan in plans]
    seconds: dict[str, float] = {}
    fitted = any(plan.tolerance for plan in plans)
    if fitted:
        fits = _fit_each(opened, plans, recipe)
        records, seconds, _ = _collect(fits, [plan.map.name for plan in plans], None, progress)
    manifest = make_manifest(opened.checkpoint, opened.selection, recipe, records)
    manifest = replace(manifest, calibration=calibrated.facts() if calibrated else {})
    nbytes = predict_size(opened.checkpoint, opened.selection, recipe, plans, records if fitted else None)
    notes = [*opened.notes, *(calibrated.notes if calibrated else ())]
    if not manifest.replaced:
        notes.append("no layer would be compressed: without --dry-run this ends with an error")
    return Compression(manifest, output, nbytes, False, seconds, notes)


def _refuse_nothing_gained(manifest: Manifest) -> None:
    if not manifest.replaced:
        first = manifest.layers[0]
        hint = "a smaller --bond, a larger --max-error, or other --layers; --dry-run shows the plan"
        if any(goal in manifest.options for goal in ("ratio", "size")):
            hint = "a smaller --ratio or --size, or other --layers; --dry-run shows the plan"
        raise MpocError(
            f"no layer would be compressed, so nothing was written ({first.layer}: {first.reason})", hint
        )


def _fit_each(opened: Opened, plans: list[LayerPlan], recipe: Recipe) -> Iterator[Fitted]:
    return (fit_layer(opened.checkpoint, plan, recipe, opened.device) for plan in plans)


def _collect(
    fits: Iterator[Fitted], names: list[str], spool: Spool | None, progress: Progress | None
) -> tuple[list[LayerRecord], dict[str, float], dict[str, list[Entry]]]:
    """Layer by layer: records, seconds, and what is spooled in the place of a tensor of the source."""
    records: list[LayerRecord] = []
    seconds: dict[str, float] = {}
    entries: dict[str, list[Entry]] = {}
    start = time.perf_counter()
    for fit in fits:
        record = fit.record
        if spool is not None:
            if fit.cores:
                entries[record.name] = [
                    spool.add(record.core_name(k), core) for k, core in enumerate(fit.cores)
                ]
            entries |= {name: [spool.add(name, tensor)] for name, tensor in fit.changed.items()}
        records.append(record)
        seconds[record.name] = time.perf_counter() - start
        if progress:
            progress(record, seconds[record.name], len(records), len(names))
        start = time.perf_counter()
    order = list(names)
    records.sort(key=lambda record: order.index(record.name))
    return records, seconds, entries


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
) -> None:
    if not checkpoint.is_directory:
        write_safetensors(target, entries, {"format": "pt", "mpoc": manifest.to_json()})
        return
    target.mkdir()
    hub_directory.copy_other_files(checkpoint.path, target, checkpoint.weight_files)
    hub_directory.write_shards(target, plan_shards(entries, max_shard_size))
    hub_directory.mark_compressed(target, manifest)
