"""``mpoc guide``: show the manual in the terminal, one Markdown page per topic.

The pages are in ``mpoc/guide`` and are shipped with the package. A terminal shows them rendered; a pipe gets
the Markdown itself, so that ``mpoc guide calibration > calibration.md`` is the page.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.errors import UsageError, nearest
from mpoc.runtime.options import argument

TOPICS = (
    "getting-started",
    "choosing-a-goal",
    "bits",
    "calibration",
    "forms",
    "convolutions",
    "fine-tuning",
    "evaluation",
    "reports",
    "large-checkpoints",
    "loading-and-exporting",
    "run",
    "entanglement",
    "the-papers",
    "file-format-and-json",
    "faults-and-untrusted-files",
    "contributing",
    "changes",
)
_WIDEST = 100  # columns of a rendered page
_LINK = re.compile(r"!?\[([^\]]+)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class GuideOptions:
    """The command line of ``mpoc guide``."""

    topic: str | None = argument("TOPIC", "The page to show.", None, shown="list the pages")


@takes(GuideOptions)
def guide(options: GuideOptions) -> None:
    """Show the manual, one page per topic.

    Examples:

    mpoc guide

    mpoc guide calibration
    """
    topic = options.topic
    if topic is None:
        _list_topics()
    elif topic in TOPICS:
        _show(read_page(topic))
    else:
        close = nearest(topic, TOPICS) or _containing(topic)
        raise UsageError(f"the guide has no topic {topic!r}{close}", "mpoc guide lists the topics")


def read_page(topic: str) -> str:
    """The Markdown of a page of the guide."""
    from importlib import resources

    return resources.files("mpoc").joinpath("guide", f"{topic}.md").read_text("utf-8")


def summary(page: str) -> str:
    """The sentence below a page's title."""
    return page.split("\n\n", 2)[1].replace("\n", " ")


def _list_topics() -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for topic in TOPICS:
        table.add_row(topic, summary(read_page(topic)))
    output = Output()
    output.result.print(table)
    output.next_command("mpoc guide getting-started")


def _show(page: str) -> None:
    """The page, rendered on a terminal."""
    console = Output().result
    if not console.is_terminal:
        sys.stdout.write(page)
        return
    from rich.markdown import Markdown

    console.print(Markdown(_for_terminal(page)), width=min(console.width, _WIDEST))


def _for_terminal(page: str) -> str:
    """The page without comments, with links that a terminal cannot follow written out."""
    return _LINK.sub(_written_out, re.sub(r"<!--.*?-->\n(?=```)", "", page))


def _written_out(link: re.Match[str]) -> str:
    text, target = link[1], link[2].partition("#")[0]
    if target.startswith("../../"):
        return f"{text}, {target.removeprefix('../../')} in the repository"
    return f"{text} (`mpoc guide {target.removesuffix('.md')}`)"


def _containing(topic: str) -> str:
    """A suggestion for a word of a topic's name, as ``papers``; else an empty string."""
    named = next((name for name in TOPICS if topic.lower() in name), None)
    return f"; did you mean {named!r}?" if named and topic else ""
