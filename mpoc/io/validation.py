"""JSON as files hold it, and from strangers: bounded, nothing but JSON, of one meaning.  No torch here.

Whether plain data read from a file holds what its annotations say.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mpoc.errors import MpocError

# Bytes: what the safetensors library accepts as a header.
LONGEST = 100_000_000
# Lists of numbers, and lists of these, over several lines: no string holds a line's end.
_NUMBERS = (re.compile(r"\[\n[-+.,eE\d\s]*\]"), re.compile(r"\[\n(?:\s*\[[-+.,eE\d ]*\],?)+\s*\]"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_Record = TypeVar("_Record")
# Every number counts bytes or parameters, or is a ratio.
_LARGEST = 1 << 63


def parse_strictly(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, longer than ``LONGEST``, a key twice, a number that is not finite, or text that
            is no Unicode.
        RecursionError: nested too deeply.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} bytes of JSON")
    text = text if isinstance(text, str) else text.decode("utf-8")
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused, parse_float=_finite)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text without a needless space; or indented, each list of numbers in one line."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    for numbers in _NUMBERS if indent else ():
        text = numbers.sub(lambda found: " ".join(found[0].split()), text)
    return text


def read_bounded(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        MpocError: there are more than ``LONGEST``.
    """
    size = path.stat().st_size
    if size > LONGEST:
        raise MpocError(f"{path}: {size:,} bytes, where a text of at most {LONGEST:,} is expected")
    return path.read_bytes()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!r} stands there twice")
    return value


def _refused(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def build_dataclass(record: Callable[..., _Record], values: Mapping[str, Any]) -> _Record:
    """A dataclass of ``values``, which hold what its annotations say.

    Raises:
        ValueError: there is a value that the class does not know.
        TypeError: one is missing, or of another type.
    """
    unknown = set(values) - set(_hints(record))
    if unknown:
        raise ValueError(f"field {min(unknown)!r} is not known")
    found: _Record = matches_type(record(**values))
    return found


def matches_type(record: Any) -> Any:
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
