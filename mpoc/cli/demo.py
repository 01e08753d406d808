"""``mpoc demo``: the whole story on handwritten digits, nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.console import Output, reported_errors


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")] = Path(
        "mpoc-demo"
    ),
    bond: Annotated[int, typer.Option(help="Cap on every bond dimension D.")] = 24,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing DIR.")] = False,
) -> None:
    """Compress a small network for handwritten digits: accuracy before, ρ table, accuracy after.

    Example: mpoc demo --bond 16
    """
    with reported_errors():
        from mpoc.cli.tables import print_report
        from mpoc.demo.story import tell_story

        words = Output()
        story = tell_story(output, bond, force)
        done = story.compression
        words.result.print(f"accuracy before: {story.accuracy_before:.2f} % ({story.images} test images)")
        print_report(words.result, done.manifest, done.nbytes, done.seconds)
        words.result.print(f"accuracy after:  {story.accuracy_after:.2f} % (no fine-tuning)")
        words.result.print("files:")
        for file in story.files:
            words.result.print(f"  {file}", soft_wrap=True)
        words.next_command(f"mpoc report {story.files[1]}")
