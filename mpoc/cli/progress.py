"""Progress on stderr: a live bar on a terminal, elsewhere one plain line per layer, evaluation or stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn

from mpoc.cli.console import Output, clock, plain
from mpoc.io.manifest import LayerRecord
from mpoc.reporting.remarks import scores_line

if TYPE_CHECKING:
    from mpoc.compression.run_context import Later, StageCallback
    from mpoc.train.monitor import TrainingEvent


_BETWEEN_LINES = 5.0  # seconds, within a stage
_WORTH_SAYING = 5.0  # seconds of work before the time left is shown

# record, its seconds, layers done, layers in all, share of the work done
LayerCallback = Callable[[LayerRecord, float, int, int, float], None]


def stage_lines(console: Output) -> StageCallback | None:
    """The callback of calibration; None when quiet.

    It says a line as a stage begins, then one every few seconds, with the time left of the whole run: by the
    steps so far, and by what is expected of later stages.
    """
    last = start = 0.0
    current, first = "", 1  # stage, and the number that it began with

    def tell(stage: str, number: int, total: int, later: Later) -> None:
        nonlocal last, start, current, first
        now = monotonic()
        begins = number == 1 or stage != current
        if begins:
            current, first, start = stage, number, now
        if begins or now - last >= _BETWEEN_LINES:
            step = (now - start) / max(1, number - first)
            left = step * (total - number + 1) + later.times * step * (total - first + 1) + later.seconds
            rest = f" ({clock(left)} left)" if number > first else ""
            console.say(f"{stage} {number:,} of {total:,}{rest}")
            last = now

    return None if console.quiet else tell


@contextmanager
def layer_progress(console: Output) -> Iterator[LayerCallback | None]:
    """The callback for the pipeline; None when quiet."""
    if console.quiet:
        yield None
    elif console.messages.is_terminal:
        yield from _bar(console)
    else:
        yield _line_by_line(console)


def _line_by_line(console: Output) -> LayerCallback:
    time_left = _time_left()

    def tell(record: LayerRecord, seconds: float, finished: int, total: int, share: float) -> None:
        error = "" if record.relative_error is None else f" error {record.relative_error:.4f}"
        if record.output_error is not None:
            error = f" output error {record.output_error:.4f}"
        line = f"[{finished}/{total}] {record.layer} {record.form} ρ {record.rho:.4f}{error} {seconds:.2f} s"
        console.say(line + (f" ({rest} left)" if (rest := time_left(share, seconds)) else ""))

    return tell


def _time_left() -> Callable[[float, float], str]:
    """A function from the share of the work done and the last layer's seconds to the time left, as text.

    The text is empty in the first seconds and at the end. The clock starts with the first layer.
    """
    start: float | None = None

    def left(share: float, seconds: float) -> str:
        nonlocal start
        start = monotonic() - seconds if start is None else start
        passed = monotonic() - start
        return clock(passed * (1 - share) / share) if passed > _WORTH_SAYING and 0 < share < 1 else ""

    return left


def _bar(console: Output) -> Iterator[LayerCallback]:
    before = after = 0
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers  ρ {task.fields[rho]:.4f}"),
        TextColumn("{task.fields[left]}"),
    )
    left = _time_left()
    with Progress(*columns, console=console.messages, transient=True) as bar:
        task = bar.add_task("reading", total=None, rho=1.0, left="")

        def tell(record: LayerRecord, seconds: float, done: int, total: int, share: float) -> None:
            nonlocal before, after
            before += record.num_original
            after += record.num_stored
            rest = f"{rest_of_it} left" if (rest_of_it := left(share, seconds)) else ""
            bar.update(
                task,
                description=plain(record.layer),
                completed=done,
                total=total,
                rho=after / before,
                left=rest,
            )

        yield tell


@contextmanager
def training_progress(console: Output) -> Iterator[Callable[[TrainingEvent], None] | None]:
    """The callback for a training; None when quiet."""
    if console.quiet:
        yield None
    elif console.messages.is_terminal:
        yield from _training_bar(console)
    else:
        yield lambda event: _say_evaluation(console, event)


def _say_evaluation(console: Output, event: TrainingEvent) -> None:
    """Print an evaluation as one line."""
    if event.scores is None:
        return
    loss = "" if event.loss != event.loss else f" training loss {event.loss:.4f}"
    measured = f" {scores_line(event.scores)}" if event.scores else ""
    rate = f" ({event.rate:,.0f} examples/s, {clock(event.seconds_left)} left)" if event.rate else ""
    console.say(f"[{event.step}/{event.steps}] epoch {event.epoch:.4g}{loss}{measured}{rate}")


def _training_bar(console: Output) -> Iterator[Callable[[TrainingEvent], None]]:
    columns = (
        TextColumn("epoch {task.fields[epoch]:.2f}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}  {task.fields[scores]}"),
        TextColumn("{task.fields[rate]:,.0f}/s  {task.fields[left]} left"),
    )
    with Progress(*columns, console=console.messages, transient=True) as bar:
        task = bar.add_task("", total=None, epoch=0.0, loss=float("nan"), scores="", rate=0.0, left="?")

        def tell(event: TrainingEvent) -> None:
            _say_evaluation(console, event)
            fields: dict[str, Any] = {"epoch": event.epoch, "loss": event.loss, "rate": event.rate}
            if event.scores:
                fields["scores"] = scores_line(event.scores)
            left = clock(event.seconds_left) if event.rate else "?"
            bar.update(task, completed=event.step, total=event.steps, left=left, **fields)

        yield tell
