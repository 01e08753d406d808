"""A few steps that belong together, which neither Ctrl-C nor SIGTERM may part."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
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
