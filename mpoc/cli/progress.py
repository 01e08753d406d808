"""Progress over layers: a live bar on a terminal, one plain line a layer elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mpoc.cli.console import Output
from mpoc.manifest import LayerRecord


@contextmanager
def layer_progress(
    words: Output,
) -> Iterator[Callable[[LayerRecord, float, int, int], None] | None]:
    """The callback for the pipeline; None when quiet."""
    if words.quiet:
        yield None
    elif words.words.is_terminal:
        yield from _bar(words)
    else:
        yield _line_by_line(words)


def _line_by_line(words: Output) -> Callable[[LayerRecord, float, int, int], None]:
    def tell(record: LayerRecord, seconds: float, done: int, total: int) -> None:
        error = "" if record.relative_error is None else f" error {record.relative_error:.4f}"
        words.say(f"[{done}/{total}] {record.layer} {record.form} ρ {record.rho:.4f}{error} {seconds:.2f} s")

    return tell


def _bar(words: Output) -> Iterator[Callable[[LayerRecord, float, int, int], None]]:
    before = after = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers  ρ {task.fields[rho]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=words.words, transient=True) as bar:
        task = bar.add_task("reading", total=None, rho=1.0)

        def tell(record: LayerRecord, seconds: float, done: int, total: int) -> None:
            nonlocal before, after
            before += record.num_original
            after += record.num_stored
            bar.update(task, description=record.layer, completed=done, total=total, rho=after / before)

        yield tell
