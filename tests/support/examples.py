"""The examples of help texts, README and guide, and how they are run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mpoc.cli.app import SUMMARIES, load_command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {name: load_command(name) for name in SUMMARIES}
PAGES = (ROOT / "README.md", *sorted((ROOT / "mpoc" / "guide").glob("*.md")))
NEEDS_DATA = "<!-- needs data -->\n"
_BLOCK = re.compile(r"(<!-- needs data -->\n)?```(sh|python|toml)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str  # sh, python or toml
    text: str
    needs_data: bool

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each ``mpoc …`` line of a shell block; redirections and comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        return [words for line in lines if (words := mpoc_arguments(line))]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    found = _BLOCK.findall(page.read_text("utf-8"))
    return [Block(language, text, bool(marked)) for marked, language, text in found]


def help_examples(command: str) -> list[str]:
    """The command lines under "Example" in a command's help, as they are written in its source."""
    text = COMMANDS[command].help or ""
    _, heading, rest = text.partition("Example")
    assert heading, f"mpoc {command} --help has no example"
    return re.findall(r"mpoc .*", rest)


def mpoc_arguments(line: str) -> list[str]:
    """What follows ``mpoc`` in ``mpoc …`` or ``torchrun … -m mpoc …``; empty for other programs."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    if words[:1] == ["mpoc"]:
        return words[1:]
    return words[words.index("mpoc") + 1 :] if words[:1] == ["torchrun"] else []
