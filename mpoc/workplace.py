"""Where an output comes to be: a folder beside it, hidden and gone at the end, or kept to go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from mpoc.errors import MpocError, UsageError
from mpoc.strict_json import parse_strictly
from mpoc.team import Team
from mpoc.uninterrupted import uninterrupted
from mpoc.writer import Place, naming, scratch_beside

_LAYERS, _CALIBRATION, _OUTPUT = "layers", "calibration", "output"
# Says that a folder is one of these; whoever works in it holds it locked.
_MARK = "mpoc-partial.json"


def kept_beside(output: Path) -> Path:
    """``OUT.partial``, where ``--resume`` keeps its work."""
    return output.resolve().parent / f"{output.name}.partial"


@contextmanager
def workplace(
    output: Path, mates: Team, asked: Mapping[str, str] | None = None, anew: bool = False
) -> Iterator[Path]:
    """A path to write to; on success it takes the place of ``output``, for all processes together.

    Beside it are folders for finished layers and for what calibration finds before.  On a failure, Ctrl-C
    included, nothing is left behind and an old ``output`` stays; with ``asked`` those folders stay in
    ``OUT.partial``.

    Args:
        output: file or directory.
        mates: the processes.
        asked: what the work is, option by option, to go on only with the same; None: nothing is kept.
        anew: remove what was kept of other work.

    Raises:
        UsageError: ``OUT.partial`` is no such folder, or of other work.
        MpocError: another process is at work in it.
    """
    place = Place(output)
    with ExitStack() as held, naming(output):
        folder = mates.by_first(lambda: _prepared(output, held, asked, anew))
        if asked is None:
            held.callback(_remove, folder)  # whoever is last: others may write to it still
        try:
            yield folder / _OUTPUT / output.name
            with mates.together():
                if mates.is_first:
                    place.take(folder / _OUTPUT / output.name, folder)
        except BaseException as error:
            place.tell(error)
            if asked is not None and not place.is_taken:
                _tell_kept(error, folder)
            raise


def _tell_kept(error: BaseException, folder: Path) -> None:
    """Note that there is work to go on from; a folder without any goes."""
    if any(_files(folder)):
        error.add_note(f"finished work is kept in {folder.name}; --resume goes on from there")
    else:
        _remove(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (one for name in (_LAYERS, _CALIBRATION) for one in (folder / name).glob("[!.]*"))


def _prepared(output: Path, held: ExitStack, asked: Mapping[str, str] | None, anew: bool) -> Path:
    """The folder, with those in it; ``held`` removes it unless it is to be kept."""
    with uninterrupted():
        folder = scratch_beside(output) if asked is None else _kept(output, held, asked, anew)
        if asked is None:
            held.callback(_remove, folder)
        for name in (_LAYERS, _CALIBRATION, _OUTPUT):
            (folder / name).mkdir(exist_ok=True)
    return folder


def _remove(folder: Path) -> None:
    with uninterrupted():
        shutil.rmtree(folder, ignore_errors=True)


def layers_of(target: Path) -> Path:
    """The folder of finished layers beside a path that :func:`workplace` gave."""
    return target.parent.parent / _LAYERS


def calibration_of(target: Path) -> Path:
    """Likewise, of the folder of what calibration finds before layers are fitted."""
    return target.parent.parent / _CALIBRATION


def _kept(output: Path, held: ExitStack, asked: Mapping[str, str], anew: bool) -> Path:
    """The folder of an earlier run without what was not finished, or a new one; ``held`` keeps others out."""
    folder = kept_beside(output)
    if os.path.lexists(folder) and not (folder / _MARK).is_file() and not _is_empty(folder):
        raise UsageError(
            f"{folder}: exists, and is not what --resume keeps its work in", "remove it, or choose another -o"
        )
    folder.mkdir(exist_ok=True)
    mark = held.enter_context((folder / _MARK).open("a+", encoding="utf-8"))
    _lock(mark, folder)
    other = _other(mark, asked)
    if other is not None and not anew:
        hint = "the same command as before goes on from there; --force starts anew"
        raise UsageError(f"{folder}: is kept of other work: {other}", hint)
    stays = (_MARK, _LAYERS, _CALIBRATION) if other is None else (_MARK,)
    for one in folder.iterdir():
        if one.name not in stays:
            _clear(one)
    mark.truncate(0)
    json.dump(dict(asked), mark)
    mark.flush()
    for one in (folder / _CALIBRATION).glob(".*"):  # what was not written to its end
        _clear(one)
    return folder


def _other(mark: TextIO, asked: Mapping[str, str]) -> str | None:
    """In what the kept work is another's; None where it is the same, or not known."""
    mark.seek(0)
    try:
        before: Any = parse_strictly(mark.read())
        found = {key: before[key] for key in asked}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    changed = [f"{key} was {found[key]} and is {asked[key]}" for key in asked if found[key] != asked[key]]
    return ", ".join(changed) or None


def _clear(one: Path) -> None:
    if one.is_dir() and not one.is_symlink():
        shutil.rmtree(one)
    else:
        one.unlink()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _lock(mark: TextIO, folder: Path) -> None:
    """Keep a second command out as long as ``mark`` is open; where the system has no such locks, none is.

    Raises:
        MpocError: another has the lock, or had it and has just taken the folder away.
    """
    try:
        import fcntl

        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = os.fstat(mark.fileno()).st_nlink > 0
    except ImportError:
        return
    except BlockingIOError:
        still_there = False
    if not still_there:
        hint = "wait for it, or choose another -o"
        raise MpocError(f"{folder}: another mpoc is at work in it", hint)
