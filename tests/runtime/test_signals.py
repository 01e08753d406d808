from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mpoc.runtime import signals
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


STUCK = """
import hashlib, sys
from pathlib import Path
from mpoc.runtime.signals import removed_on_exit, unwind_on_signals
folder = Path(sys.argv[1])
folder.mkdir()
with unwind_on_signals(), removed_on_exit(folder, "out is not written"):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)  # minutes in native code
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_native_code_ends_the_process(
    tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    folder = tmp_path / "scratch"
    command = [sys.executable, "-c", STUCK, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(1)  # until it is there
        process.send_signal(signum)
        assert process.wait(timeout=30) == status
        assert process.stderr.read().endswith("note: out is not written\n")
    assert not folder.exists()


def test_a_section_that_must_end_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals, "_PATIENCE", 0.01)
    monkeypatch.setattr(signals, "_leave", left.append)
    monkeypatch.setattr(signals, "_called", threading.Event())
    read, write = os.pipe()
    watcher = threading.Thread(target=signals._watch, args=(read, frozenset([15])))
    watcher.start()
    with defer_signals():
        os.write(write, bytes([15]))
        time.sleep(0.1)
        assert not left
    while not left:
        time.sleep(0.01)
    signals._called.set()  # a handler is called after all
    os.close(write)
    watcher.join()
    os.close(read)
