"""Handle SIGINT (Ctrl-C) and SIGTERM.

A command unwinds on either (:func:`unwind_on_signals`), so that no half-written file stays.  Training inside
it finishes its step and saves a checkpoint first (:func:`catch_stop_signals`).  A critical section inside
either, such as two renames that belong together, runs to its end before the signal takes effect
(:func:`defer_signals`).  Each sets the handlers for as long as it lasts and restores those it found.  Python
delivers signals to the main thread alone; in other threads the three contexts change nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)
_SAME_PRESS = 1.0  # seconds; torchrun passes a Ctrl-C on, so that one press arrives twice


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
    try:
        for signum in signums:
            signal.signal(signum, handler)
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
    with _handled_by(stop, _STOPS if interruptible else (signal.SIGTERM,)):
        try:
            yield
        except Exception:
            if received:
                raise received[-1] from None
            raise


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

    with _handled_by(note):
        yield request


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold signals back during a critical section; the first of them takes effect at its end."""
    waiting: list[int] = []
    try:
        with _handled_by(lambda signum, _: waiting.append(signum)):
            yield
    finally:
        for signum in waiting[:1]:
            signal.raise_signal(signum)
