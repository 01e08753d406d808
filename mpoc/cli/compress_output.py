"""What ``mpoc compress`` prints: the table or JSON, and scores before and after."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mpoc.cli.console import Output
from mpoc.cli.tables import print_report, scores_line
from mpoc.report import report_dict, to_json

if TYPE_CHECKING:
    from mpoc.pipeline import Compression
    from mpoc.train.measure import Measured


def print_json(done: Compression, before: Measured | None, after: Measured | None) -> None:
    """The report as JSON on stdout, with the scores where there are some."""
    report = report_dict(done.manifest, done.nbytes, done.seconds)
    report["written"] = str(done.output) if done.written else None
    if before is not None and after is not None:
        report["evaluation"] = {"before": before.as_dict(), "after": after.as_dict()}
    sys.stdout.write(to_json(report) + "\n")


def print_table(done: Compression, before: Measured | None, after: Measured | None, words: Output) -> None:
    """The table, the totals, and the scores."""
    seconds = done.seconds or None
    print_report(words.result, done.manifest, done.nbytes, seconds, not done.written, words.verbose)
    for title, found in (("before", before), ("after", after)):
        if found is not None:
            line = f"{title}: {scores_line(found.scores)} ({found.split}, {found.examples:,} examples)"
            words.result.print(line, soft_wrap=True)
