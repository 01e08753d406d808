from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from mpoc.runtime.signals import Terminated, catch_stop_signals, defer_signals, unwind_on_signals


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


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_each_signal_raises_its_exception(signum: signal.Signals, raised: type[BaseException]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(raised), unwind_on_signals():
            signal.raise_signal(signum)
        with pytest.raises(raised), unwind_on_signals():
            try:
                signal.raise_signal(signum)
            except BaseException as error:  # as native code does
                raise ValueError("an error of its own") from error
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("context", [defer_signals, catch_stop_signals, unwind_on_signals])
def test_other_threads_keep_handlers(context: Callable[[], AbstractContextManager[Any]]) -> None:
    seen: list[object] = []

    def work() -> None:
        with context():
            seen.append(signal.getsignal(signal.SIGTERM))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_training_notes_the_first_signal_and_a_second_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with catch_stop_signals() as request:
        assert request.signum == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # one press may arrive twice
        signal.raise_signal(signal.SIGTERM)
        assert request.signum == signal.SIGINT
        now[0] += 1.1
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
