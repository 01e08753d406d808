"""Where an output comes to be: a folder beside it, hidden and gone at the end, or kept to go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpoc.errors import MpocError, UsageError
from mpoc.team import Team
from mpoc.writer import naming, put_in_place, scratch_beside

_LAYERS = "layers"
# Says that a folder is one of these, and of what source.
_MARK = "mpoc-partial.json"


def kept_beside(output: Path) -> Path:
    """``OUT.partial``, where ``--resume`` keeps its work."""
    return output.resolve().parent / f"{output.name}.partial"


@contextmanager
def workplace(output: Path, mates: Team, resume: bool = False) -> Iterator[Path]:
    """A path to write to; on success it takes the place of ``output``, for all processes together.

    Beside it is a folder ``layers`` for what is finished.  On a failure, Ctrl-C included, nothing is left
    behind and an old ``output`` stays; with ``resume`` the finished layers stay in ``OUT.partial``.

    Raises:
        UsageError: ``OUT.partial`` is no such folder.
        MpocError: another process is at work in it.
    """
    with mates.together():
        folder = None
        if mates.is_first:
            folder = _opened_again(kept_beside(output)) if resume else scratch_beside(output)
            (folder / _LAYERS).mkdir(exist_ok=True)
    folder = mates.told(folder)
    assert folder is not None
    try:
        with naming(output), _locked(folder, mates.is_first and resume):
            yield folder / output.name
            with mates.together():
                if mates.is_first:
                    put_in_place(folder / output.name, output)
    except BaseException as error:
        if resume:
            error.add_note(f"finished layers are kept in {folder.name}; the same command goes on from there")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if mates.is_first:
        shutil.rmtree(folder, ignore_errors=True)


def layers_of(target: Path) -> Path:
    """The folder of finished layers beside a path that :func:`workplace` gave."""
    return target.parent / _LAYERS


def _opened_again(folder: Path) -> Path:
    """The folder as it was left, without what was not finished; made where it is not there."""
    if os.path.lexists(folder) and not (folder / _MARK).is_file():
        raise UsageError(
            f"{folder}: exists, and is not what --resume keeps its work in", "remove it, or choose another -o"
        )
    folder.mkdir(exist_ok=True)
    (folder / _MARK).write_text(json.dumps({"made by": "mpoc compress --resume"}) + "\n", "utf-8")
    for one in folder.iterdir():
        if one.name not in (_MARK, _LAYERS):
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
    return folder


@contextmanager
def _locked(folder: Path, wanted: bool) -> Iterator[None]:
    """Keep a second command out of the folder; where the system has no such locks, none is."""
    if not wanted:
        yield
        return
    with (folder / _MARK).open() as mark:
        try:
            import fcntl

            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError as error:
            raise MpocError(
                f"{folder}: another mpoc is at work in it", "wait for it, or choose another -o"
            ) from error
        yield
