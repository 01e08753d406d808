"""The errors that users meet; each has a message and, if there is one, a hint that fixes it."""

from __future__ import annotations

import glob
import shlex

# Characters of a message: text from an untrusted file may have any length.
_LONGEST = 2000


class MpocError(Exception):
    """The work failed: exit status 1.

    ``hint`` names the command or option that fixes it; a traceback shows it too.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…")
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")


class UsageError(MpocError):
    """The command line or the recipe is wrong: exit status 2."""

    exit_code = 2


def command_line(*words: object) -> str:
    """A command line for the shell, each word quoted where it must be."""
    return shlex.join(map(str, words))


def excluding(layer: str) -> str:
    """The option that excludes a layer or tensor, with the characters of patterns in its name escaped."""
    return command_line("--exclude", glob.escape(layer))


def shortened(value: object) -> str:
    """A value or an error as text, shortened to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 300 else f"{text[:300]}…"


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'bond'?"`` for the known word closest to ``word``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
