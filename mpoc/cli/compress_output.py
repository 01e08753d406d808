"""What ``mpoc compress`` prints: the table or JSON, scores before and after, and the trials of a search."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from mpoc.cli.console import Output
from mpoc.cli.tables import print_report, scores_line
from mpoc.report import human_bytes, report_dict, to_json

if TYPE_CHECKING:
    from mpoc.compression import Compression
    from mpoc.search import Bisection, Trial
    from mpoc.train.measure import Measured


@dataclass(frozen=True)
class Compressed:
    """What was done, and measured."""

    done: Compression
    before: Measured | None  # None: not asked for
    after: Measured | None
    search: Bisection | None = None


def print_json(found: Compressed) -> None:
    """The report as JSON on stdout, with scores and trials where there are some."""
    done = found.done
    report = report_dict(done.manifest, done.nbytes, done.seconds)
    report["written"] = str(done.output) if done.written else None
    if found.before is not None and found.after is not None:
        report["evaluation"] = {"before": found.before.as_dict(), "after": found.after.as_dict()}
    if found.search is not None:
        report["search"] = [_trial_dict(trial, found.search) for trial in found.search.trials]
    sys.stdout.write(to_json(report) + "\n")


def _trial_dict(trial: Trial, search: Bisection) -> dict[str, Any]:
    return {
        "ratio": trial.ratio,
        "nbytes": trial.nbytes,
        "scores": {name: _number(score) for name, score in trial.scores.items()},
        "drop": _number(trial.drop),
        "kept": search.keeps(trial),
        "chosen": trial is search.chosen,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def print_table(found: Compressed, words: Output) -> None:
    """The trials, the table, the totals, and the scores."""
    done = found.done
    if found.search is not None and found.before is not None:
        nbytes = done.manifest.source.nbytes
        words.result.print(goal_line(found.before, found.search.max_drop), soft_wrap=True)
        words.result.print(_trials(found.search, found.before, nbytes))
        words.result.print()
    seconds = done.seconds or None
    print_report(words.result, done.manifest, done.nbytes, seconds, not done.written, words.verbose)
    for title, measured in (("before", found.before), ("after", found.after)):
        if measured is not None:
            line = (
                f"{title}: {scores_line(measured.scores)} ({measured.split}, {measured.examples:,} examples)"
            )
            words.result.print(line, soft_wrap=True)


def _trials(search: Bisection, before: Measured, nbytes: int | None) -> Table:
    """By size, the dense network last."""
    metric = before.metric
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("on disk", "--ratio", metric, "drop"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for trial in sorted(search.trials, key=lambda trial: trial.nbytes):
        is_chosen = trial is search.chosen
        said = "chosen" if is_chosen else "" if search.keeps(trial) else "loses too much"
        table.add_row(
            human_bytes(trial.nbytes),
            f"{trial.ratio:.3f}",
            _value(metric, trial.scores[metric]),
            f"{trial.drop:.4g}",
            said,
            style="bold" if is_chosen else None,
        )
    size = "" if nbytes is None else human_bytes(nbytes)
    table.add_row(size, "", _value(metric, before.scores[metric]), "", "dense", style="dim")
    return table


def _value(metric: str, value: float) -> str:
    return scores_line({metric: value}).removeprefix(metric.replace("_", " ")).strip()


def goal_line(before: Measured, max_drop: float | None) -> str:
    """What is measured on what, and how far it may go."""
    like = "" if before.reference is None else " with the original (no labels or no head: likeness)"
    value = scores_line({before.metric: before.scores[before.metric]})
    way = "fall" if before.higher_is_better else "rise"
    where = f"{before.data} ({before.split}, {before.examples:,} examples)"
    return f"{value}{like} on {where}; it may {way} by {max_drop:g}"


def trial_line(trial: Trial, kept: bool) -> str:
    """One trial."""
    found = f"{human_bytes(trial.nbytes)}, {scores_line(dict(trial.scores))}"
    return f"ρ {trial.ratio:.3f}: {found}; drop {trial.drop:.4g}, {'kept' if kept else 'too much'}"
