"""One sink for output: results on stdout, messages on stderr; and errors as messages and exit statuses."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

from rich.console import Console
from rich.text import Text

from mpoc.errors import MpocError
from mpoc.runtime.distributed import is_main
from mpoc.runtime.signals import Terminated, unwind_on_signals

MOST_SILENCE = 9.0  # seconds
_WIDTH_OFF_TERMINAL = 200
_BAD_COMMAND, _INTERRUPTED, _TERMINATED = 2, 130, 143  # exit statuses


class Output:
    """The consoles of a command: ``result`` on stdout, ``messages`` on stderr.

    ``quiet`` suppresses messages, but not errors. Of several processes only the main one prints; in the
    others ``silent`` is true.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.silent = not is_main()
        self.quiet = quiet or self.silent
        self.verbose = verbose
        self.result = _console(stderr=False)
        self.messages = _console(stderr=True)
        self._said = monotonic()

    def say(self, text: str) -> None:
        """Print a message on stderr."""
        self._said = monotonic()
        if not self.quiet:
            self.messages.print(plain(text), soft_wrap=True)

    @contextmanager
    def never_silent(self) -> Iterator[None]:
        """Meanwhile a message says after every ten seconds without one that the work goes on."""
        ended, start = Event(), monotonic()

        def watch() -> None:
            while not ended.wait(max(0.05, self._said + MOST_SILENCE - monotonic())):
                if monotonic() - self._said >= MOST_SILENCE:
                    self.say(f"at work for {clock(monotonic() - start)}")

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def next_command(self, command: str) -> None:
        """Print the next useful command on stderr."""
        self.say(f"next: {command}")


def clock(seconds: float) -> str:
    """``3725`` → ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(text: str) -> str:
    """Text without control characters of a terminal: names come from untrusted files."""
    if all(map(_is_plain, text)):
        return text
    return "".join(letter if _is_plain(letter) else repr(letter)[1:-1] for letter in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in "\n\t"


def titled(title: str, text: str, style: str = "bold") -> Text:
    """``title: text`` with the title in a style."""
    return Text.assemble((f"{title}:", style), " ", plain(text))


def _console(stderr: bool) -> Console:
    """A console without markup and emoji, which names of layers and files would be taken for."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_OFF_TERMINAL
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn errors into one message on stderr and the exit status: 1, 2, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with unwind_on_signals():
            yield
    except MpocError as error:
        _fail(error, str(error), error.hint, error.exit_code)
    except (KeyboardInterrupt, Terminated) as stop:
        if isinstance(stop, KeyboardInterrupt):
            _fail(stop, "interrupted", None, _INTERRUPTED)
        _fail(stop, "stopped by SIGTERM", None, _TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        _fail(error, _os_message(error), _os_hint(error), 1)
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't alloc" not in text:
            raise
        hint = "use a machine with more memory, or --device cpu where a GPU was used"
        _fail(error, f"out of memory: {error}", hint, 1)


def _notes(error: BaseException) -> list[str]:
    """Notes that were added to an error, but for the hint, which has its own line."""
    hint = f"hint: {getattr(error, 'hint', None)}"
    return [note for note in getattr(error, "__notes__", []) if note != hint]


def _fail(error: BaseException, message: str, hint: str | None, status: int) -> None:
    if status in (_BAD_COMMAND, _INTERRUPTED, _TERMINATED) and not is_main():
        raise SystemExit(status)  # every process has the same command line or signal: one message is enough
    console = _console(stderr=True)
    console.print(titled("error", message, "bold red"), soft_wrap=True)
    for note in _notes(error):
        console.print(titled("note", note), soft_wrap=True)
    if hint:
        console.print(titled("hint", hint), soft_wrap=True)
    raise SystemExit(status)


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _os_hint(error: OSError) -> str | None:
    hints = {
        errno.ENOSPC: "free disk space, or write elsewhere with -o",
        errno.EDQUOT: "free disk space, or write elsewhere with -o",
        errno.EACCES: "write elsewhere with -o, or change the permissions",
        errno.EROFS: "write elsewhere with -o",
    }
    return hints.get(error.errno or 0)
