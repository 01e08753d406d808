"""Whether plain data read from a file holds what its annotations say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")
# Every number counts bytes or parameters, or is a ratio.
_LARGEST = 1 << 63


def made(record: Callable[..., _Record], values: Mapping[str, Any]) -> _Record:
    """A dataclass of ``values``, which hold what its annotations say.

    Raises:
        ValueError: there is a value that the class does not know.
        TypeError: one is missing, or of another type.
    """
    unknown = set(values) - set(_hints(record))
    if unknown:
        raise ValueError(f"field {min(unknown)!r} is not known")
    found: _Record = typed(record(**values))
    return found


def typed(record: Any) -> Any:
    """``record``, whose fields hold what their annotations say.

    Raises:
        TypeError: one does not.
    """
    for name, expected in _hints(record.__class__).items():
        if not _is_a(getattr(record, name), expected):
            raise TypeError(f"{name} = {getattr(record, name)!r}")
    return record


@cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def _is_a(value: Any, expected: Any) -> bool:
    """``isinstance`` for the annotations used here: plain classes, unions, tuples and dictionaries."""
    kind, inner = get_origin(expected), get_args(expected)
    if kind is tuple:
        each = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is_a, value, each))
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(item, inner[1]) for item in value.values())
    if inner:
        return any(_is_a(value, one) for one in inner)
    if expected in (int, float):
        return type(value) in (int, expected) and -_LARGEST < value < _LARGEST  # no NaN
    return expected is Any or isinstance(value, expected)
