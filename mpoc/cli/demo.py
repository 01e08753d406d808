"""``mpoc demo``: the whole story on handwritten digits, nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpoc.cli.console import Output, escape, reported_errors

if TYPE_CHECKING:
    from mpoc.demo.story import Story


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")] = Path(
        "mpoc-demo"
    ),
    bond: Annotated[int, typer.Option(help="Cap on every bond dimension D.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing DIR.")] = False,
) -> None:
    """Compress a small network for handwritten digits and fine-tune it: ρ table, accuracy at each stage.

    Fine-tuning takes seconds on a CPU, and needs pip install 'mpoc[train]'.

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
        words.result.print(f"accuracy after compression: {story.accuracy_after:.2f} %")
        again = _heal(story, words)
        words.result.print("files:")
        for file in story.files.written():
            words.result.print(f"  {file}", soft_wrap=True)
        if again:
            words.result.print("fine-tune and measure it yourself:")
            for command in again:
                words.result.print(f"  {command}", soft_wrap=True)
        words.next_command(f"mpoc report {story.files.tuned if again else story.files.compressed}")


def _heal(story: Story, words: Output) -> list[str]:
    """Fine-tune and say how it went; the command lines that do the same, none where it could not."""
    from mpoc.demo.story import heal
    from mpoc.train.stop import Interrupted

    try:
        healed = heal(story)
    except Interrupted as stop:
        words.say("stopped while fine-tuning; mpoc demo --force starts anew")
        raise SystemExit(128 + stop.signum) from None
    if healed is None:
        words.result.print(escape("left out: fine-tuning, which needs accelerate: pip install 'mpoc[train]'"))
        return []
    words.result.print(f"accuracy after fine-tuning: {healed:.2f} %")
    return story.files.commands()
