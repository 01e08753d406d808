"""A command in a child process in which something goes wrong at a chosen moment.

Children are forked from a process that has imported torch and mpoc and has one thread, so that a run takes a
tenth of a second and thousands can be made.  Moments are counted: everything that is done to a file in the
child's folder (as Python's audit events, the raw writes of its files, and ``fsync`` tell), or every line of
mpoc that has to do with outputs and errors.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import gc
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import mpoc

LONGEST = 60.0  # seconds; a child that takes more hangs
_READS = frozenset({"open to read", "read"})
_CHANGES = frozenset({"open to write", "write", "half a write", "copy", "fsync", "mkdir", "rename"})
# What each clock counts.
CLOCKS = {
    "files": _CHANGES | {"open to read", "list", "remove", "rmdir"},
    "changes": _CHANGES,
    "reads": _READS,
    "lines": frozenset({"line"}),
}
_AUDITED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}
_AUDITED |= {"os.scandir": "list", "os.listdir": "list"}
_PACKAGE = Path(mpoc.__file__).parent
_TRACED_MODULES = (
    *("cli/compress", "cli/console", "cli/expand", "cli/finetune", "cli/progress", "cli/report"),
    *("compression/expand", "compression/pipeline", "compression/resume", "compression/write"),
    *("io/atomic", "io/hub_directory", "io/keyed_store", "io/safetensors_writer"),
    *("reporting/html", "runtime/distributed", "runtime/signals"),
    *("train/output", "train/training_checkpoint"),
)
_TRACED = frozenset([contextlib.__file__, *(str(_PACKAGE / f"{name}.py") for name in _TRACED_MODULES)])
assert all(Path(file).is_file() for file in _TRACED)


@dataclass(frozen=True)
class Fault:
    """At the ``at``-th moment of a clock: a signal, or an error of the system, by its name."""

    what: str
    clock: str
    at: int


@dataclass
class Ended:
    """How a child ended: exit status (a signal's number, negative, where that killed it) and its words."""

    status: int
    out: str
    err: str
    hung: bool = False
    struck: str | None = None  # what was being done when the fault came; None: it never came
    begun: bool = False  # whether mpoc was at work then, and had taken signals upon itself
    moments: dict[str, int] = field(default_factory=dict)  # clock → how many, of a child without a fault
    modules: list[str] = field(default_factory=list)  # that such a child imported


class _Clock:
    """Counts, and lets the fault happen."""

    def __init__(self, folder: Path, fault: Fault | None, tell: Callable[[dict[str, Any]], None]) -> None:
        self._inside = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118
        self._fault, self._tell = fault, tell
        self._counts: Counter[str] = Counter()
        self.running = False

    def tick(self, kind: str, path: object = None) -> None:
        if not self.running:
            return
        if self._fault is None:
            self._counts.update(clock for clock, kinds in CLOCKS.items() if kind in kinds)
        elif kind in CLOCKS[self._fault.clock]:
            self._counts["all"] += 1
            if self._counts["all"] == self._fault.at:
                self._strike(self._fault.what, kind, path)

    def counts(self) -> dict[str, int]:
        return {clock: self._counts[clock] for clock in CLOCKS}

    def _strike(self, what: str, kind: str, path: object) -> None:
        begun = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        self._tell({"struck": kind, "begun": begun})
        if what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what])
            return
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number), *([path] if path else []))

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._inside)  # noqa: PTH100

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's own word on what it is about to do."""
        if not self.running:
            return
        if event == "open" and self._is_inside(args[0]):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR)
            reads = "open to read" if args[1] is not None else "list"  # rmtree opens folders
            self.tick("open to write" if writes else reads, args[0])
        elif event in _AUDITED and (self._is_inside(args[0]) or self._beneath_one(args)):
            self.tick(_AUDITED[event], args[0])

    def _beneath_one(self, args: tuple[Any, ...]) -> bool:
        """Relative to a folder that is open, as rmtree works."""
        return len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> IO[Any]:
        """As ``open``, with the raw writes and reads of files inside the folder counted."""
        if not self.running or buffering == 0 or not self._is_inside(file) or "+" in mode:
            return _OPEN(file, mode, buffering, *rest, **more)
        raw = _Counted(file, mode.replace("t", "").replace("b", ""))
        raw.clock = self
        binary: Any = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *rest, **more)

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        """A trace function."""
        if event == "call" and frame.f_code.co_filename not in _TRACED:
            return None
        if event == "line":
            self.tick("line")
        return self.line

    def install(self) -> None:
        """In this process, for good."""
        sys.addaudithook(self.audit)
        builtins.open = io.open = self.open  # type: ignore[assignment]
        os.fsync = self._counted("fsync", os.fsync)
        os.sendfile = self._counted("copy", os.sendfile)
        self.running = True
        if self._fault is None or self._fault.clock == "lines":
            sys.settrace(self.line)

    def _counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.tick(kind)
            return call(*args)

        return counted


_OPEN = io.open


class _Counted(io.FileIO):
    """A file whose every write can fail, or be cut off in the middle."""

    clock: _Clock

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.clock.tick("write")
        done = super().write(view[: len(view) // 2])
        if done:
            self.clock.tick("half a write")
        return done + super().write(view[done:])

    def readinto(self, buffer: Any) -> int:
        self.clock.tick("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.clock.tick("read")
        return super().readall()


_NEVER = Fault("SIGKILL", "files", 0)


def attempt(
    work: Callable[[], object],
    folder: Path,
    fault: Fault | None = None,
    file_size: int | None = None,
    counted: bool = False,
) -> Ended:
    """Let a child do ``work`` in ``folder``.

    Args:
        work: may end with SystemExit; its words go to stdout and stderr.
        folder: the child's current one; what is done to files in it is counted.
        fault: None: none of its own accord.
        file_size: in bytes; the system lets no file of the child grow beyond.
        counted: without a fault: count the moments of each clock.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            _live(
                work,
                folder,
                None if counted else fault or _NEVER,
                file_size,
                (out.fileno(), err.fileno(), send),
            )
        os.close(send)
        said, hung = _listen(receive, pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        words = [stream.read().decode("utf-8", "replace") for stream in (out, err)]
    return Ended(status, words[0], words[1], hung, **said)


def _listen(receive: int, pid: int) -> tuple[dict[str, Any], bool]:
    """What a child tells until it ends; one that takes too long is killed."""
    text, until = b"", time.monotonic() + LONGEST
    while select.select([receive], [], [], max(0.0, until - time.monotonic()))[0]:
        more = os.read(receive, 65536)
        text += more
        if not more:
            break
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(receive)
    said: dict[str, Any] = {}
    for line in text.splitlines():
        said |= json.loads(line)
    return said, time.monotonic() >= until


def _live(
    work: Callable[[], object],
    folder: Path,
    fault: Fault | None,
    file_size: int | None,
    pipes: tuple[int, int, int],
) -> None:
    """The child's life; never returns."""
    status, known, send = 1, {*sys.modules}, pipes[2]
    gc.freeze()  # what the parent made need not be looked through
    clock = _Clock(folder, fault, lambda fact: _tell(send, fact))
    try:
        _settle(folder, file_size, pipes)
        clock.install()
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        clock.running = False
        sys.settrace(None)
        gc.collect()  # as at the end of every Python
        sys.stdout.flush()
        sys.stderr.flush()
        if fault is None:
            _tell(send, {"moments": clock.counts(), "modules": sorted({*sys.modules} - known)})
        os._exit(status)


def _settle(folder: Path, file_size: int | None, pipes: tuple[int, int, int]) -> None:
    """As a process finds the world that a shell starts."""
    os.dup2(pipes[0], 1)
    os.dup2(pipes[1], 2)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))


def _tell(send: int, fact: dict[str, Any]) -> None:
    os.write(send, json.dumps(fact).encode() + b"\n")


def command(*arguments: str) -> Callable[[], object]:
    """``mpoc`` with these arguments, as its console script runs it."""

    def run() -> None:
        from mpoc.cli.app import main

        sys.argv = ["mpoc", *arguments]
        main()

    return run
