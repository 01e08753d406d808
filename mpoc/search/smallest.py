"""Compress to one budget after another and keep the smallest output that loses little enough.

What does not depend on the budget is done once: the source is opened, the dense network measured and, with
calibration data, studied.  Trials are written beside the output, at most two at a time, and the chosen one is
put in its place as it was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.compression import Compression, Progress, Work, write_compressed
from mpoc.errors import MpocError, UsageError
from mpoc.opened import open_source
from mpoc.pipeline import choose_device, refuse_output
from mpoc.plan import least_ratio
from mpoc.processes import num_processes
from mpoc.recipe import Recipe
from mpoc.report import human_bytes
from mpoc.search.bisection import Bisection, Trial
from mpoc.train.material import DataOptions
from mpoc.train.measure import Measured, MeasureRequest, measure
from mpoc.writer import staged

if TYPE_CHECKING:
    from mpoc.calibrate.dense import Tell
    from mpoc.calibrate.study import CalibrationRequest


@dataclass(frozen=True)
class Smallest:
    """What was found."""

    done: Compression  # the chosen one
    before: Measured
    after: Measured
    search: Bisection  # its trials


@dataclass(frozen=True)
class Watch:
    """Who is told what; nobody, unless asked."""

    start: Callable[[Measured], None] = lambda before: None  # the dense network was measured
    trial: Callable[[Trial, bool], None] = lambda trial, kept: None
    layers: Callable[[], AbstractContextManager[Progress | None]] = nullcontext  # of one trial
    stage: Tell | None = None  # as :func:`mpoc.pipeline.compress_checkpoint` takes it


def compress_within(
    source: Path,
    output: Path,
    recipe: Recipe,
    data: DataOptions,
    force: bool = False,
    arch: str | None = None,
    calibration: CalibrationRequest | None = None,
    watch: Watch | None = None,
) -> Smallest:
    """Compress a checkpoint to the smallest output found whose metric loses at most ``recipe.max_drop``.

    The metric is that of the task: accuracy in per cent, or a loss.  Where data and network make no task, as
    with embeddings or without labels, it is the likeness to the original: agreement in per cent where
    outputs are logits, else the cosine.

    Args:
        source: file or directory; only read.
        output: file (single-file source) or directory.
        recipe: what to do, with a ``max_drop``.
        data: to measure on.
        force: replace an existing output.
        arch: as :func:`mpoc.pipeline.compress_checkpoint` takes it.
        calibration: as there.
        watch: is told what goes on.

    Raises:
        UsageError: options that do not fit, or no network is known.
        MpocError: bad input, or no trial keeps the metric; nothing is written then.
        OSError: of reading or writing (a full disk).
    """
    if recipe.max_drop is None:
        raise UsageError("a recipe without max_drop: there is nothing to search for", "--max-drop 1")
    if num_processes() > 1:
        raise UsageError("--max-drop measures one file after another, in one process: no torchrun")
    watch = watch or Watch()
    refuse_output(source, output, force)
    opened = open_source(source, recipe, arch, calibration is not None, choose_device(recipe.device))
    least = least_ratio(opened.plan(opened.recipe), recipe.allow_growth)
    request = MeasureRequest(source, data, arch=arch, stand_in=source, device=recipe.device)
    before = measure(request)
    watch.start(before)
    study = None if calibration is None else opened.study(calibration, watch.stage)

    def attempt(ratio: float, target: Path) -> tuple[Compression, Measured]:
        at_ratio = replace(opened.recipe, ratio=ratio)
        with watch.layers() as progress:
            work = Work.beside(target, progress)
            done = write_compressed(opened, target, at_ratio, opened.plan(at_ratio), study, work)
        return done, measure(replace(request, source=target))

    search = Bisection(recipe.max_drop, least)
    with staged(output) as target:
        best = _smallest(search, before, attempt, target, watch)
        if best is None:
            raise _nothing_keeps_it(search, before, calibration is not None)
    done, after = best
    return Smallest(replace(done, output=output), before, replace(after, model=output), search)


def _smallest(
    search: Bisection,
    before: Measured,
    attempt: Callable[[float, Path], tuple[Compression, Measured]],
    target: Path,
    watch: Watch,
) -> tuple[Compression, Measured] | None:
    """Try until the search is over; the chosen output is at ``target`` then. None: there is none."""
    best = None
    folder = target.with_name(f"{target.name}.trial")
    while (ratio := search.next_ratio()) is not None:
        folder.mkdir()
        done, after = attempt(ratio, folder / target.name)
        trial = Trial(ratio, done.nbytes, after.drop_from(before), after.scores)
        search.trials.append(trial)
        watch.trial(trial, search.keeps(trial))
        if search.chosen is trial:
            best = done, after
            _remove(target)
            done.output.rename(target)
        shutil.rmtree(folder)
    return best


def _remove(path: Path) -> None:
    """What an earlier trial left, if any."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _nothing_keeps_it(search: Bisection, before: Measured, calibrated: bool) -> MpocError:
    nearest = search.nearest
    if not search.trials:
        return MpocError(
            f"these layers are at ρ {search.least:.4f} with every bond at 1: nothing smaller can be searched",
            "take larger layers in, or leave hard ones out with --exclude",
        )
    found = "none gives a number"
    if nearest is not None:
        values = (scores[before.metric] for scores in (before.scores, nearest.scores))
        change = " to ".join(f"{value:.4g}" for value in values)
        found = f"the best, ρ {nearest.ratio:.3f} ({human_bytes(nearest.nbytes)}), takes it from {change}"
    fit = "more --calibration-samples" if calibrated else "--calibrate DATA, which fits what the layers do"
    return MpocError(
        f"none of {len(search.trials)} trials keeps {before.metric} on {before.data} within "
        f"{search.max_drop:g}: {found}; nothing was written",
        f"{fit}; a larger --max-drop; or --ratio and then mpoc finetune",
    )
