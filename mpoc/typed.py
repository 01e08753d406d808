"""Whether plain data read from a file holds what its annotations say."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin, get_type_hints


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
        return isinstance(value, int | expected) and not isinstance(value, bool)
    return expected is Any or isinstance(value, expected)
