"""What a network keeps at each size: it is rounded to one after another in memory, and nothing is written.

The dense network is measured once, and so is how far errors in each layer move its outputs.  For every size
the layers are rounded as for a file, and the held-out outputs of that network are compared with the dense
one's.  Without calibration data only the errors of the weights are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.compression.pipeline import as_request, in_scratch
from mpoc.compression.plain_fit import Fitted
from mpoc.compression.recipe import Recipe, check_recipe
from mpoc.compression.run_context import LayerCallback, Progress, RunContext, StageCallback
from mpoc.compression.size_prediction import predict_weight_bytes
from mpoc.compression.source import CompressionSource, open_to_calibrate
from mpoc.compression.write import Job, fit_all, make_job
from mpoc.errors import UsageError
from mpoc.io.manifest import LayerRecord
from mpoc.io.open_checkpoint import read_finite
from mpoc.reporting.charts import Axis, Chart, Series
from mpoc.reporting.schemas import SIZES
from mpoc.runtime.device import choose_device
from mpoc.runtime.distributed import num_processes

if TYPE_CHECKING:
    from mpoc.compression.calibrate.calibration_data import CalibrationRequest
    from mpoc.compression.calibrate.statistics import CalibrationStatistics

SHARES = (0.25, 0.13, 0.08, 0.05)  # of the bytes of the selected weights
# Ways to spend the same bytes: as the manifest names them, and as tables do.
WAYS = {"this": "mpoc", "rounded to nearest": "rounded to nearest", "GPTQ": "GPTQ"}
_LEAST = 1e-9  # on a logarithmic axis: rounding errors make a KL zero, or less
# What is drawn: the first that is known.
_DRAWN = {
    "cosine": Axis("cosine to the dense network's outputs"),
    "kl": Axis("KL from the dense network's outputs, nats", "log"),
    "relative_error": Axis("relative error of the weights"),
}


@dataclass(frozen=True)
class SizeRow:
    """What is kept at one size."""

    share: float  # of the source's weight files, that was asked for
    nbytes: int  # of weight files; an upper bound
    bits_per_weight: float
    # By way (a key of ``WAYS``) the likeness of outputs to the dense network's
    likeness: Mapping[str, Mapping[str, float]]
    relative_error: float | None  # of all selected weights together, without calibration

    @property
    def option(self) -> str:
        """The option that writes this size."""
        return f"--size {100 * self.share:g}%"


@dataclass(frozen=True)
class SizeTable:
    """The rows by falling size, and what they are of."""

    source: str
    nbytes: int  # of the source's weight files
    rows: list[SizeRow]
    effort: str | None  # of a calibration
    calibration: dict[str, Any]  # what the likeness was measured on; empty without data
    knows_network: bool  # whether the source says what its network is
    notes: list[str]

    def to_dict(self, command: Callable[[SizeRow], str]) -> dict[str, Any]:
        """The table as plain data; its schema is ``mpoc.reporting.schemas.schema("sizes")``.

        Args:
            command: that writes the size of a row.
        """
        rows = [
            {
                "share": row.share,
                "nbytes": row.nbytes,
                "bits_per_weight": row.bits_per_weight,
                "likeness": row.likeness,
                "relative_error": row.relative_error,
                "command": command(row),
            }
            for row in self.rows
        ]
        source = {"name": self.source, "nbytes": self.nbytes}
        return {"schema": SIZES, "source": source, "calibration": self.calibration, "rows": rows}

    def chart(self) -> Chart:
        """What is kept over the share of the source, a line for each way to spend the bytes."""
        every = [row.likeness or {"this": {"relative_error": row.relative_error or 0.0}} for row in self.rows]
        known = (name for name in _DRAWN if all(name in kept["this"] for kept in every))
        measure = next(known, "relative_error")  # of outputs that are not finite nothing is known
        least = _LEAST if _DRAWN[measure].scale == "log" else -math.inf
        shares = [100 * row.nbytes / self.nbytes for row in self.rows]
        lines = {
            way: [
                (share, max(least, kept[way][measure]))
                for share, kept in zip(shares, every, strict=True)
                if measure in kept.get(way, {})
            ]
            for way in WAYS
        }
        series = tuple(
            Series(WAYS[way], tuple(reversed(points)), "marked line", tone)
            for (way, points), tone in zip(lines.items(), ("stored", "original", "error"), strict=True)
        )
        x = Axis("share of the source's weight files, %", "log")
        return Chart("", "", x, _DRAWN[measure], series)


@dataclass(frozen=True)
class TableCallbacks:
    """The callbacks for the progress of a table."""

    row: Callable[[SizeRow], None] = lambda row: None
    layers: Callable[[], AbstractContextManager[LayerCallback | None]] = nullcontext  # of one row
    stage: StageCallback | None = None  # of the calibration, which serves all rows


def make_size_table(
    source: Path,
    recipe: Recipe,
    calibrate: CalibrationRequest | Path | None = None,
    arch: str | None = None,
    callbacks: TableCallbacks | None = None,
) -> SizeTable:
    """Round a checkpoint to sizes at which ``SHARES`` of the selected weights are left.

    Args:
        source: a file or directory; it is only read.
        recipe: the options; its size counts for nothing, and ``--effort fast`` is the default.
        calibrate: data for calibration, as :func:`mpoc.compression.pipeline.compress_checkpoint` takes them.
        arch: likewise.
        callbacks: for progress.

    Raises:
        UsageError: options that do not fit, several processes, or no size can be reached.
        MpocError: bad input.
    """
    callbacks = callbacks or TableCallbacks()
    if num_processes() > 1:
        raise UsageError("a table of sizes is made in one process: no torchrun")
    with in_scratch(as_request(calibrate), None) as request:
        recipe = replace(recipe, size=1.0)
        check_recipe(recipe)
        context = RunContext(
            choose_device(recipe.device), progress=Progress(stage=callbacks.stage), fits_once=False
        )
        opened = open_to_calibrate(source, recipe, arch, request)
        if opened.request is not None and recipe.effort is None:
            opened = replace(opened, recipe=replace(opened.recipe, effort="fast"))
        statistics = None if opened.request is None else opened.statistics(opened.request, context)
        rows = _Rows(opened, context, statistics, callbacks)
        made = list(rows.every())
    checkpoint = opened.checkpoint
    return SizeTable(
        source.name,
        checkpoint.nbytes_on_disk,
        made,
        opened.recipe.effort,
        {} if statistics is None else statistics.facts(),
        checkpoint.kinds is not None,
        [*opened.notes, *(statistics.notes if statistics else ()), *rows.notes],
    )


def shares_of(source: CompressionSource) -> list[float]:
    """The sizes of the rows as shares of the source's weight files, in whole per cent."""
    checkpoint, chosen = source.checkpoint, source.selection.chosen
    selected = sum(checkpoint.infos[map.name].nbytes for map in chosen) / checkpoint.nbytes_on_disk
    per_cent = {round(100 * (1 - selected + share * selected)) for share in SHARES}
    return [number / 100 for number in sorted(per_cent, reverse=True)]


@dataclass
class _Rows:
    """Makes the rows of one source."""

    source: CompressionSource
    context: RunContext
    statistics: CalibrationStatistics | None
    callbacks: TableCallbacks
    notes: list[str] = field(default_factory=list)
    _norms: dict[str, float] = field(default_factory=dict)  # squared, of weights

    def every(self) -> Iterator[SizeRow]:
        """The rows, as far as sizes can be reached.

        Raises:
            UsageError: none can.
        """
        for number, share in enumerate(shares_of(self.source)):
            try:
                job = self._job(share)
            except UsageError as error:
                if number == 0:
                    raise
                self.notes.append(f"{error}; the smallest is {error.hint}" if error.hint else str(error))
                return
            row = self._row(share, job)
            self.callbacks.row(row)
            yield row

    def _job(self, share: float) -> Job:
        """The compression to a share of the source.

        Raises:
            UsageError: it is too small.
        """
        source = self.source
        recipe = replace(source.recipe, size=share).with_bytes_of(source.checkpoint.nbytes_on_disk)
        job = make_job(source, recipe, source.plan(recipe), self.context, self.statistics)
        if job.calibrated is not None:
            job.calibrated.compares_gptq = True
        return job

    def _row(self, share: float, job: Job) -> SizeRow:
        records: list[LayerRecord] = []

        def keep(fitted: Fitted, seconds: float) -> int:
            records.append(fitted.record)
            return len(records)

        costs = {plan.map.name: plan.cost for plan in job.plans}
        if job.calibrated is not None:
            costs = job.calibrated.schedule.costs(job.plans)
        with self.callbacks.layers() as layer:
            context = replace(self.context, progress=Progress(layer))
            fit_all(job.fits(), costs, len(job.plans), keep, context)
            job.finish()
        manifest = job.manifest(records)
        likeness = manifest.calibration.get("likeness", {})
        facts = dict(manifest.calibration)
        if likeness and job.recipe.effort == "fast":  # the command of the row does not compare with GPTQ
            facts["likeness"] = {way: kept for way, kept in likeness.items() if way != "GPTQ"}
        opened = self.source.checkpoint, self.source.selection
        nbytes = predict_weight_bytes(*opened, job.recipe, job.plans, facts or None, records)
        error = self._relative_error(records) if job.calibrated is None else None
        return SizeRow(share, nbytes, manifest.bits_per_weight, likeness, error)

    def _relative_error(self, records: list[LayerRecord]) -> float:
        """‖W − Ŵ‖ / ‖W‖ of all selected weights together."""
        for record in records:
            if record.name not in self._norms:
                weight = read_finite(self.source.checkpoint, record.name)
                self._norms[record.name] = float(weight.double().square().sum())
        whole = sum(self._norms.values())
        lost = sum((record.relative_error or 0.0) ** 2 * self._norms[record.name] for record in records)
        return math.sqrt(lost / whole) if whole else 0.0
