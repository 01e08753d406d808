"""Handle SIGINT (Ctrl-C) and SIGTERM.

A command unwinds on either (:func:`unwind_on_signals`), so that no half-written file stays.  Training inside
it finishes its step and saves a checkpoint first (:func:`catch_stop_signals`).  A critical section inside
either, such as two renames that belong together, runs to its end before the signal takes effect
(:func:`defer_signals`).  Each sets the handlers for as long as it lasts and restores those it found.  Python
delivers signals to the main thread alone; in other threads the three contexts change nothing.

Python calls a handler between two of its own instructions: not before an eigendecomposition has ended, which
may take minutes.  A thread therefore waits beside a command.  Where no handler was called within two seconds
it removes what the command would have removed (:func:`removed_on_exit`) and ends the process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 2.0  # seconds, in native code
_SAME_PRESS = 1.0  # seconds; torchrun passes a Ctrl-C on, so that one press arrives twice


_called = threading.Event()  # a handler of Python was called
_critical: list[None] = []  # sections that a signal does not end
_keys = count()
_on_exit: dict[int, tuple[Path | None, str]] = {}  # what to remove, and what to say


class Terminated(SystemExit):
    """SIGTERM arrived."""


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """Training stopped on a signal, with everything saved that a resume needs.

    Args:
        signum: the signal's number.
        step: steps done.
        saved: whether there is a checkpoint.
    """

    def __init__(self, signum: int, step: int, saved: bool) -> None:
        super().__init__(f"stopped at step {step}")
        self.signum, self.step, self.saved = signum, step, saved


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], signums: Sequence[signal.Signals] = _STOPS
) -> Iterator[None]:
    """Give ``handler`` these signals; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in signums}

    def noted(signum: int, frame: FrameType | None) -> None:
        _called.set()
        handler(signum, frame)

    try:
        for signum in signums:
            signal.signal(signum, noted)
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and :class:`Terminated` on SIGTERM.

    Either is raised again where native code that it interrupts turns it into an error of its own, as torch's
    does.  A SIGINT that is ignored (under nohup) or handled by somebody else stays so.
    """
    received: list[BaseException] = []

    def stop(signum: int, _: FrameType | None) -> None:
        received.append(KeyboardInterrupt() if signum == signal.SIGINT else Terminated())
        raise received[-1]

    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signums = _STOPS if interruptible else (signal.SIGTERM,)
    with _handled_by(stop, signums), _watched(signums):
        try:
            yield
        except Exception:
            if received:
                raise received[-1] from None
            raise


@contextmanager
def _watched(signums: Sequence[signal.Signals]) -> Iterator[None]:
    """A thread ends the process on a signal that no handler is called for; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    _called.clear()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read, frozenset(signums)), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        watcher.join()
        os.close(read)


def _watch(read: int, signums: frozenset[int]) -> None:
    while received := os.read(read, 1):
        if received[0] in signums:
            while not _called.wait(_PATIENCE):
                if not _critical:
                    _leave(received[0])
            _called.clear()


def _leave(signum: int) -> None:
    """End the process while its main thread is in native code."""
    left = list(_on_exit.values())
    for path, _ in left:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
    words = "interrupted" if signum == signal.SIGINT else "stopped by SIGTERM"
    notes = "".join(f"note: {note}\n" for note in dict.fromkeys(note for _, note in left if note))
    sys.stderr.write(f"error: {words}\n{notes}")
    sys.stderr.flush()
    os._exit(128 + signum)


@contextmanager
def removed_on_exit(path: Path | None, note: str = "") -> Iterator[None]:
    """Meanwhile a signal in native code removes a directory and says something of it.

    Args:
        path: the directory, which an exception removes as well, as the caller sees to; None: none.
        note: for the user; "" for none.
    """
    key = next(_keys)
    _on_exit[key] = path, note
    try:
        yield
    finally:
        del _on_exit[key]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    _critical.append(None)
    try:
        yield
    finally:
        _critical.pop()


@dataclass
class StopRequest:
    """The first signal that asked for a stop."""

    signum: int = 0  # 0: none so far
    received_at: float = 0.0  # by the monotonic clock


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Note the first signal and go on; a second press of Ctrl-C raises KeyboardInterrupt."""
    request = StopRequest()

    def note(signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not request.signum:
            request.signum, request.received_at = signum, now
        elif signum == signal.SIGINT and now - request.received_at > _SAME_PRESS:
            raise KeyboardInterrupt

    with _handled_by(note), _uninterrupted():
        yield request


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold signals back during a critical section; the first of them takes effect at its end."""
    waiting: list[int] = []
    try:
        with _handled_by(lambda signum, _: waiting.append(signum)), _uninterrupted():
            yield
    finally:
        for signum in waiting[:1]:
            signal.raise_signal(signum)
