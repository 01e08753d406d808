"""Version numbers compared, as far as mpoc's own bounds and files of later versions need it.  No torch here.

Releases count by their numbers; what follows them (``+cpu``, ``rc1``) does not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpoc
from mpoc.errors import MpocError, shortened

_RELEASE = re.compile(r"(\d{1,9}(?:\.\d{1,9}){0,5})(?:(?:[+-]|\.?[a-z])[\w.+-]{0,40})?")
_BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*([\w.+]+)")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def release(version: str) -> tuple[int, ...] | None:
    """``2.13.0+cpu`` → (2, 13), zeros at the end left out; None where it is no version."""
    found = _RELEASE.fullmatch(version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", found[1]).split("."))) if found else None


def is_later(version: str, than: str) -> bool:
    """Whether both are versions and the first comes after the second."""
    first, second = release(version), release(than)
    return first is not None and second is not None and first > second


def is_within(version: str, bounds: str) -> bool:
    """Whether ``2.13.0`` keeps ``>=2.6,<2.14``; what is no version keeps none."""
    found = release(version)
    pairs = ((_COMPARE[sign], release(bound)) for sign, bound in _BOUND.findall(bounds))
    return found is not None and all(bound is not None and keeps(found, bound) for keeps, bound in pairs)


def unreadable(path: Path, tool: Any, error: Exception) -> MpocError:
    """What to say of a manifest: damaged, or written by a later mpoc with more in it than this one knows.

    Args:
        path: of the file.
        tool: what the manifest says of its writer, ``"mpoc 0.2.0"``; unchecked.
        error: of reading it.
    """
    writer = tool.removeprefix("mpoc ") if isinstance(tool, str) else ""
    if is_later(writer, mpoc.__version__):
        return MpocError(
            f"{path}: written by mpoc {writer}, this is mpoc {mpoc.__version__}: {error}",
            "pip install --upgrade mpoc",
        )
    return MpocError(f"{path}: damaged manifest ({shortened(error)})")
