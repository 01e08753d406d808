"""Put output files and directories in place whole or not at all.  No torch here.

An output is written to a hidden directory beside its place and renamed into it; a signal in between takes
effect afterwards.  On a failure nothing is left behind, and an older output stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mpoc.errors import MpocError, UsageError, command_line
from mpoc.runtime.signals import defer_signals, removed_on_exit

_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
# The files that mpoc adds to a directory, besides weight files and copies.
_OWN_FILES = ("mpoc.json", "mpoc-history.json", "config.json", "README.md", "modeling_low_rank.py")


def refuse_existing(
    output: Path,
    source: Path,
    force: bool,
    refuse_foreign: Callable[[Path, Path], None] | None = None,
) -> None:
    """Check, before any work, that ``output`` may be written.

    Args:
        output: file or directory.
        source: what it is made from.
        force: replace an existing output.
        refuse_foreign: is called with both paths before ``output`` is replaced, and raises if it must not be;
            None: refuse an output of another kind than the source, or with files that are no model's.

    Raises:
        UsageError: it exists and ``force`` is not given, or writing it would touch the source.
        MpocError: its directory does not exist or cannot be written.
    """
    if output.name in ("", ".."):
        raise UsageError(f"{output}: not a name for an output", "choose another -o")
    target, origin = output.resolve(), source.resolve()
    if target == origin or target in origin.parents or (source.is_dir() and origin in target.parents):
        raise UsageError(f"{output}: would write over or into the input {source}", "choose another -o")
    if os.path.lexists(output):
        if not force:
            raise UsageError(f"{output}: exists already", "--force replaces it; or choose another name")
        (refuse_foreign or _refuse_foreign_directory)(output, source)
    parent = target.parent
    if not parent.is_dir():
        raise MpocError(f"{output}: there is no directory {parent}", command_line("mkdir", "-p", parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MpocError(f"{output}: no permission to write in {parent}")


def refuse_misnamed(output: Path, source: Path) -> None:
    """Check that the output of a single file has the suffix .safetensors, by which it is recognised.

    Raises:
        UsageError: another suffix.
    """
    if not source.is_dir() and output.suffix != ".safetensors":
        raise UsageError(
            f"{output}: the output is a safetensors file and must be named like one",
            command_line("-o", output.with_suffix(".safetensors")),
        )


def _refuse_foreign_directory(output: Path, source: Path) -> None:
    """Refuse to replace anything but a model: --force must not remove a home directory."""
    if output.is_dir() != source.is_dir():
        kinds = ("a directory", "a file") if output.is_dir() else ("a file", "a directory")
        raise UsageError(f"{output}: is {kinds[0]}, and the output is {kinds[1]}", "choose another -o")
    if output.exists() and not (output.is_dir() or output.is_file()):
        raise UsageError(f"{output}: neither a file nor a directory", "choose another -o")
    if output.is_dir():
        _refuse_foreign_files(output, source)


def _refuse_foreign_files(output: Path, source: Path) -> None:
    for file in sorted(output.rglob("*")):
        name = file.relative_to(output)
        ours = name.name in _OWN_FILES or file.suffix == ".safetensors" or _INDEX.search(name.name)
        if file.is_file() and not ours and not (source / name).exists():
            raise UsageError(
                f"{output}: holds {name}, which no output of mpoc would, so --force does not remove it",
                "choose another -o",
            )


@contextmanager
def staged(output: Path, announced: bool = True) -> Iterator[Path]:
    """A path beside ``output`` to write to; on success it takes the place of ``output``.

    On any failure, Ctrl-C included, nothing is left behind and an old ``output`` stays.

    Args:
        output: file or directory.
        announced: errors and signals name ``output`` and say what became of it; False for a file of mpoc's
            own that the user did not name.
    """
    scratch, place = None, Place(output)
    try:
        with defer_signals():
            scratch = scratch_beside(output)
        note = place.state if announced else ""
        with naming(output) if announced else nullcontext(), removed_on_exit(scratch, note):
            yield scratch / output.name
            place.take(scratch / output.name, scratch)
    except BaseException as error:
        if scratch is not None:
            with defer_signals():
                shutil.rmtree(scratch, ignore_errors=True)
        if announced:
            place.tell(error)
        raise


def write_text(output: Path, text: str) -> None:
    """Write a text file in UTF-8, through :func:`staged`."""
    with staged(output) as target:
        target.write_text(text, "utf-8")


class Place:
    """The place of an output, which is taken by what was written beside it."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.is_taken = False

    def take(self, new: Path, scratch: Path) -> None:
        """Rename ``new`` to the output and remove its directory ``scratch``, with signals deferred.

        Raises:
            OSError: it cannot be renamed; both are as they were.
        """
        with defer_signals():
            put_in_place(new, self._output)
            self.is_taken = True
            for folder in sorted(scratch.iterdir()):  # what says whose scratch it is goes last
                if folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)

    def tell(self, error: BaseException) -> None:
        """Note what became of the output, on an exception that is not an error, such as a signal's."""
        if not isinstance(error, Exception | GeneratorExit):
            error.add_note(self.state)

    @property
    def state(self) -> str:
        """Whether the output is written, in words."""
        there = "as it was" if os.path.lexists(self._output) else "not written"
        return f"{self._output} is {'written' if self.is_taken else there}"


def scratch_beside(output: Path) -> Path:
    """A new, hidden directory for what is to become ``output``."""
    folder = output.resolve().parent
    return Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=folder))


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Make errors of writing name ``output``: a failing write names no file, a failing copy its source.

    An error that already names another output is left as it is.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not error.filename or (full and not isinstance(error.filename, _Named)):
            error.filename = _Named(output)
        raise


class _Named(str):
    """The name of an output, in an error."""

    __slots__ = ()


def put_in_place(new: Path, output: Path) -> None:
    """Rename what was written to ``output``, which names the old or the new at every moment.

    An old directory is exchanged with the new one in one step where the system can, and else set aside first.
    """
    if not (new.is_dir() and output.is_dir() and not output.is_symlink()):
        new.replace(output)
        return
    if _exchanged(new, output):
        return
    aside = new.with_name(f"{output.name}.replaced")
    try:
        output.rename(aside)
        new.rename(output)
    except BaseException:
        if aside.exists() and not output.exists():
            aside.rename(output)
        raise


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two paths (Linux: renameat2 with RENAME_EXCHANGE); returns whether it succeeded."""
    library = ctypes.CDLL(None)
    if not sys.platform.startswith("linux") or not hasattr(library, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(library.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)
