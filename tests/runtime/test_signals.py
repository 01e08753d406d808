from __future__ import annotations

import signal
import threading

import pytest

from mpoc.runtime.signals import defer_signals


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_deferred_and_raised_once(signum: signal.Signals) -> None:
    before, done = signal.signal(signum, stop), []
    try:
        with pytest.raises(KeyboardInterrupt), defer_signals():
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            done.append("all steps")
        assert done
        with defer_signals():
            pass  # nothing of it is left
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    finally:
        signal.signal(signum, before)


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_keep_handlers() -> None:
    seen: list[object] = []

    def work() -> None:
        with defer_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
