"""A few steps that belong together, which neither Ctrl-C nor SIGTERM may part.

Ctrl-C and SIGTERM while training: the step is finished, a checkpoint saved; a second Ctrl-C ends it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AT_ONCE = 1.0  # seconds; torchrun hands one Ctrl-C on, so that it arrives twice


@contextmanager
def defer_signals() -> Iterator[None]:
    """What stops a process waits until the steps are done, and stops it then.

    Handlers of signals are changed for the while, which the main thread alone can; in others nothing is, and
    need not be: signals do not reach them.
    """
    waiting: list[int] = []
    stops = signal.SIGINT, signal.SIGTERM
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {stop: signal.signal(stop, lambda number, _: waiting.append(number)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, signal.SIG_DFL if handler is None else handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


class Interrupted(Exception):  # noqa: N818 (no error: what was asked for)
    """Training stopped on a signal, with everything saved that a resume needs.

    Args:
        signum: of the signal.
        step: steps done.
        saved: whether there is a checkpoint.
    """

    def __init__(self, signum: int, step: int, saved: bool) -> None:
        super().__init__(f"stopped at step {step}")
        self.signum, self.step, self.saved = signum, step, saved


class StopSignals:
    """A context in which the first signal only sets ``received``; elsewhere than in the main thread, none."""

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again = self.received and signum == signal.SIGINT
        if again and time.monotonic() - self._when > _AT_ONCE:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signum, time.monotonic()
