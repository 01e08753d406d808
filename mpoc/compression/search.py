"""Search for the smallest output that keeps a metric: compress to one budget after another.

A budget is a size, as a share of the source's weight files, or where a form is asked for, a ratio ρ.  A
smaller one mostly loses more, so the interval between one that lost too much and one that did not is
halved: of a ratio its width, of a size its logarithm.  Metrics on finite data are not quite monotone; their
order only says where to try next.  The answer is the smallest output of those that were written, measured
and found good.

What does not depend on the budget is done once: the source is opened, the dense network is evaluated and,
with calibration data, measured, and so is how far errors in each layer move its outputs.  Trials are written
beside the output, at most two at a time, and the chosen one is moved to its place as it was measured.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.compression.budget import UnreachableSizeError
from mpoc.compression.pipeline import as_request, in_scratch, refuse_output
from mpoc.compression.recipe import Recipe
from mpoc.compression.run_context import LayerCallback, Progress, RunContext, StageCallback
from mpoc.compression.source import CompressionSource, open_to_calibrate
from mpoc.compression.write import Compression, make_job, record_scores, scores_record, write_compressed
from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import staged
from mpoc.reporting.charts import Axis, Chart, Series
from mpoc.runtime.device import choose_device
from mpoc.runtime.distributed import num_processes
from mpoc.runtime.formatting import human_bytes
from mpoc.train.evaluate_file import FileEvaluation, evaluate_file
from mpoc.train.settings import DataOptions, EvaluationRequest

if TYPE_CHECKING:
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest
    from mpoc.compression.calibrate.statistics import CalibrationStatistics


_UNITS = {"accuracy": " (%)", "agreement": " (%)"}
_GRID = 1000  # budgets have three decimals
_FINE = 0.02  # the share of a budget at which an interval is narrow enough
_MOST_TRIALS = 8


@dataclass(frozen=True)
class Trial:
    """One output that was written and measured."""

    budget: float  # that was asked for: a ratio, or a share of the source's weight files
    nbytes: int  # on disk
    drop: float  # of the metric, in its unit; negative: a gain; NaN: it is not a number
    scores: Mapping[str, float]
    goal: str = "ratio"  # or "size"

    @property
    def option(self) -> str:
        """The option that makes this output again."""
        return f"--{self.goal} " + (f"{self.budget:.1%}" if self.goal == "size" else f"{self.budget:.3f}")


@dataclass
class Bisection:
    """Bisection over a budget: ask for the next one and add the trial made at it, until there is none.

    Args:
        max_drop: largest loss of the metric.
        least: budget that no output can go below.
        most: budget that the dense network meets.
        goal: ``"ratio"`` or ``"size"``.
    """

    max_drop: float
    least: float = 0.0
    most: float = 1.0
    goal: str = "ratio"
    trials: list[Trial] = field(default_factory=list)  # in the order they were made

    def keeps(self, trial: Trial) -> bool:
        """Whether the metric drops by no more than ``max_drop``."""
        return trial.drop <= self.max_drop

    def next_budget(self) -> float | None:
        """The next budget to try; None: the search is over."""
        low, high = math.floor(self.least * _GRID), math.floor(self.most * _GRID)
        for trial in self.trials:
            tried = round(trial.budget * _GRID)
            low, high = (low, tried) if self.keeps(trial) else (tried, high)
        middle = math.isqrt(max(low, 1) * high) if self.goal == "size" else (low + high) // 2
        fine = bool(self.trials) and high - low <= _FINE * high
        over = middle <= low or fine or len(self.trials) == _MOST_TRIALS
        return None if over else middle / _GRID

    @property
    def chosen(self) -> Trial | None:
        """The smallest trial that keeps the metric, of equal sizes the one of least drop; None: none does."""
        kept = [trial for trial in self.trials if self.keeps(trial)]
        return min(kept, key=lambda trial: (trial.nbytes, trial.drop), default=None)

    @property
    def nearest(self) -> Trial | None:
        """The trial of least drop; None: no trial has a drop that is a number."""
        known = [trial for trial in self.trials if not math.isnan(trial.drop)]
        return min(known, key=lambda trial: (trial.drop, trial.nbytes), default=None)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The trials in the order they were made, as JSON takes them: None in place of NaN."""
        return [
            {
                trial.goal: trial.budget,
                "nbytes": trial.nbytes,
                "scores": {name: _number(score) for name, score in trial.scores.items()},
                "drop": _number(trial.drop),
                "kept": self.keeps(trial),
                "chosen": trial is self.chosen,
            }
            for trial in self.trials
        ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class SearchResult:
    """The chosen output, with the metric before and after."""

    compression: Compression  # the chosen one
    before: FileEvaluation
    after: FileEvaluation
    search: Bisection  # its trials

    def chart(self) -> Chart:
        """The metric of all trials over their size, with the chosen one, the dense network and the limit."""
        search, before, metric = self.search, self.before, self.before.metric
        chosen, source = search.chosen, self.compression.manifest.source.nbytes
        assert chosen is not None
        points = sorted((float(trial.nbytes), trial.scores[metric]) for trial in search.trials)
        dense = () if source is None else ((float(source), before.scores[metric]),)
        sign = -1 if before.higher_is_better else 1
        limit = before.scores[metric] + sign * search.max_drop
        limits = ((0.0, limit), (max(x for x, _ in (*points, *dense)), limit))
        best = (float(chosen.nbytes), chosen.scores[metric])
        series = (
            Series("compressed", tuple(points), "marked line", "stored"),
            Series(f"chosen: {chosen.option}", (best,), "ring", "error"),
            Series("dense", dense, "dots", "original"),
            Series(f"dense {'−+'[sign > 0]} {search.max_drop:g}", limits, "dotted line", "error"),
        )
        y = Axis(f"{metric} on {before.data}, {before.split}{_UNITS.get(metric, '')}")
        return Chart("", "", Axis("size on disk", unit="bytes", from_zero=True), y, series)


@dataclass(frozen=True)
class SearchCallbacks:
    """The callbacks for the progress of a search."""

    start: Callable[[FileEvaluation], None] = lambda before: None  # the dense network was measured
    trial: Callable[[Trial, bool], None] = lambda trial, kept: None
    layers: Callable[[], AbstractContextManager[LayerCallback | None]] = nullcontext  # of one trial
    stage: StageCallback | None = None  # of the calibration, which serves all trials


@dataclass(frozen=True)
class SearchRequest:
    """A search: what to compress, and the data that the metric is measured on."""

    source: Path  # file or directory; only read
    output: Path  # file (single-file source) or directory
    recipe: Recipe  # with a ``max_drop``
    data: DataOptions  # to measure the metric on
    calibrate: CalibrationRequest | Path | None = None  # as ``compress_checkpoint`` takes it
    arch: str | None = None  # likewise
    force: bool = False  # replace an existing output


def compress_within(request: SearchRequest, callbacks: SearchCallbacks | None = None) -> SearchResult:
    """Compress a checkpoint to the smallest output found whose metric loses at most ``max_drop``.

    The metric is that of the task: accuracy in per cent, or a loss.  Where data and network make no task, as
    with embeddings or without labels, it is the similarity to the original: agreement in per cent where
    outputs are logits, else the cosine.

    Raises:
        UsageError: options that do not fit, or no network is known.
        MpocError: bad input, or no trial keeps the metric; nothing is written then.
        OSError: reading or writing failed (a full disk).
    """
    source, output, recipe = request.source, request.output, request.recipe
    if recipe.max_drop is None:
        raise UsageError("a recipe without max_drop: there is nothing to search for", "--max-drop 1")
    if num_processes() > 1:
        raise UsageError("--max-drop measures one file after another, in one process: no torchrun")
    refuse_output(source, output, request.force)
    with in_scratch(as_request(request.calibrate), output) as calibration:
        return _searched(request, calibration, callbacks or SearchCallbacks(), recipe.max_drop)


def _searched(
    request: SearchRequest,
    calibration: CalibrationRequest | None,
    callbacks: SearchCallbacks,
    max_drop: float,
) -> SearchResult:
    """Search; the arguments fit together."""
    source, output, recipe, arch = request.source, request.output, request.recipe, request.arch
    context = RunContext(
        choose_device(recipe.device), progress=Progress(stage=callbacks.stage), fits_once=False
    )
    opened = open_to_calibrate(source, recipe, arch, calibration)
    calibration = opened.request
    search = Bisection(max_drop, *opened.budget_range())
    evaluation = EvaluationRequest(source, request.data, arch=arch, stand_in=source, device=recipe.device)
    before = evaluate_file(evaluation)
    callbacks.start(before)
    opened = opened.with_scores(scores_record(before))
    statistics = None if calibration is None else opened.statistics(calibration, context)
    trials = _Trials(opened, context, statistics, evaluation, before, callbacks)
    with staged(output) as target:
        best = _smallest(search, before, trials, target)
        if best is None:
            raise _nothing_keeps_it(search, before, calibration is not None)
    compression, after = best
    return SearchResult(replace(compression, output=output), before, replace(after, model=output), search)


@dataclass(frozen=True)
class _Trials:
    """Compresses one source to any budget, and measures the output."""

    source: CompressionSource
    context: RunContext
    statistics: CalibrationStatistics | None
    evaluation: EvaluationRequest  # of the dense network
    before: FileEvaluation
    callbacks: SearchCallbacks

    def run(self, goal: str, budget: float, target: Path) -> tuple[Compression, FileEvaluation]:
        """Write one trial to ``target``, evaluate it, and have it record that."""
        options: dict[str, Any] = {"max_drop": None, goal: budget}
        recipe = replace(self.source.recipe, **options)
        recipe = recipe.with_bytes_of(self.source.checkpoint.nbytes_on_disk)
        with self.callbacks.layers() as layer:
            context = replace(self.context, progress=Progress(layer))
            job = make_job(self.source, recipe, self.source.plan(recipe), context, self.statistics)
            compression = write_compressed(job, target)
        after = evaluate_file(replace(self.evaluation, source=target))
        return record_scores(compression, scores_record(self.before, after)), after


def _smallest(
    search: Bisection,
    before: FileEvaluation,
    trials: _Trials,
    target: Path,
) -> tuple[Compression, FileEvaluation] | None:
    """Run trials until the search is over, and leave the chosen output at ``target``; None: there is none."""
    best = None
    folder = target.with_name(f"{target.name}.trial")
    while (budget := search.next_budget()) is not None:
        folder.mkdir()
        try:
            compression, after = trials.run(search.goal, budget, folder / target.name)
        except UnreachableSizeError:  # with what calibration records, which the fewest bits alone do not tell
            search.least = budget + 1 / _GRID
            shutil.rmtree(folder)
            continue
        trial = Trial(budget, compression.nbytes, after.drop_from(before), after.scores, search.goal)
        search.trials.append(trial)
        trials.callbacks.trial(trial, search.keeps(trial))
        if search.chosen is trial:
            best = compression, after
            _remove(target)
            compression.output.rename(target)
        shutil.rmtree(folder)
    return best


def _remove(path: Path) -> None:
    """Remove the output of an earlier trial, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _nothing_keeps_it(search: Bisection, before: FileEvaluation, calibrated: bool) -> MpocError:
    nearest = search.nearest
    by_size = search.goal == "size"
    if not search.trials:
        least = f"these layers are at ρ {search.least:.4f} with every bond at 1"
        if by_size:
            least = f"with the fewest bits the output has {search.least:.1%} of the source's bytes"
        return MpocError(
            f"{least}: nothing smaller can be searched",
            "take larger layers in, or leave hard ones out with --exclude",
        )
    best = "none gives a number"
    if nearest is not None:
        values = (scores[before.metric] for scores in (before.scores, nearest.scores))
        change = " to ".join(f"{value:.4g}" for value in values)
        best = f"the best, {nearest.option} ({human_bytes(nearest.nbytes)}), takes it from {change}"
    fit = "more --calibration-samples" if calibrated else "--calibrate DATA, which fits what the layers do"
    return MpocError(
        f"none of {len(search.trials)} trials keeps {before.metric} on {before.data} within "
        f"{search.max_drop:g}: {best}; nothing was written",
        f"{fit}; a larger --max-drop; or --{search.goal} and then mpoc finetune",
    )
