"""Read JSON from untrusted files and check it against annotated types.  No torch here.

JSON is read strictly: at most ``LONGEST`` bytes, no duplicate keys, finite numbers only.  What it must hold
is stated once, by the annotations of a dataclass or a TypedDict (``Annotated[int, ("minimum", 1), "number of
sites"]``).  Readers check values against them, and the published JSON Schemas are generated from them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mpoc.errors import MpocError, shortened

# Bytes: the longest header that the safetensors library accepts.
LONGEST = 100_000_000
# Lists of numbers, and lists of these, over several lines: no string holds a line's end.
_NUMBERS = (re.compile(r"\[\n[-+.,eE\d\s]*\]"), re.compile(r"\[\n(?:\s*\[[-+.,eE\d ]*\],?)+\s*\]"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_Record = TypeVar("_Record")
_LARGEST = 1 << 63  # whole numbers count bytes or parameters

Whole = Annotated[int, ("minimum", 0)]
Positive = Annotated[int, ("minimum", 1)]
NonNegative = Annotated[float, ("minimum", 0)]


def parse_strictly(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, longer than ``LONGEST``, a duplicate key, a number that is not finite, or text
            that is not Unicode.
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
    """JSON text without spaces, or indented with each list of numbers on one line."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    for numbers in _NUMBERS if indent else ():
        text = numbers.sub(lambda match: " ".join(match[0].split()), text)
    return text


def read_bounded(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        MpocError: the file is longer than ``LONGEST``.
    """
    size = path.stat().st_size
    if size > LONGEST:
        raise MpocError(f"{path}: {size:,} bytes, but a text may have at most {LONGEST:,}")
    return path.read_bytes()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!r} occurs twice")
    return value


def _refused(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def build_dataclass(record: Callable[..., _Record], values: Mapping[str, Any]) -> _Record:
    """Build a dataclass from plain data and check every field against its annotation.

    Raises:
        ValueError: a field that the class does not have.
        TypeError: a field that is missing, of another type, or outside the bounds of its annotation.
    """
    unknown = set(values) - set(_hints(record))
    if unknown:
        raise ValueError(f"field {min(unknown)!r} is not known")
    built = record(**values)
    check_fields(vars(built), record)
    return built


def check_fields(values: Any, record: Any) -> None:
    """Check the values that a dataclass or a TypedDict names; others are allowed.

    Raises:
        TypeError: a value of another type, or outside the bounds of its annotation.
    """
    if not isinstance(values, dict):
        raise TypeError(shortened(TypeError(values)))
    for name, expected in _hints(record).items():
        if name in values and not _checker(expected)(values[name]):
            raise TypeError(f"{name} = {values[name]!r}")


@cache
def _hints(record: Any) -> dict[str, Any]:
    """Annotations with their bounds; ``NotRequired`` stays around them."""
    return get_type_hints(record, include_extras=True)


@cache
def _checker(expected: Any) -> Callable[[Any], bool]:
    """A test whether a value is of an annotated type, within the bounds that it states."""
    kind, inner = get_origin(expected), get_args(expected)
    if is_typeddict(expected):
        return _record_checker(expected)
    if kind is Annotated:
        limits = [note for note in inner[1:] if isinstance(note, tuple)]
        tests: list[Callable[[Any], bool]] = [_checker(inner[0])]
        tests += [partial(_LIMITS[keyword], bound) for keyword, bound in limits]
        return lambda value: all(test(value) for test in tests)
    if kind is tuple and inner[-1] is not ...:
        parts = [_checker(part) for part in inner]
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(test(item) for test, item in zip(parts, value, strict=True))
        )
    if kind in (tuple, list):
        item = _checker(inner[0])
        return lambda value: isinstance(value, kind) and all(map(item, value))
    if kind is dict:
        item = _checker(inner[1])
        return lambda value: isinstance(value, dict) and all(map(item, value.values()))
    if inner:  # a union, or NotRequired
        options = [_checker(option) for option in inner]
        return lambda value: any(option(value) for option in options)
    if expected in (int, float):
        return lambda value: type(value) in (int, expected) and _is_moderate(value)
    return lambda value: expected is Any or isinstance(value, expected)


def _record_checker(record: Any) -> Callable[[Any], bool]:
    """The same for a TypedDict; fields that it does not name are allowed."""
    tests = {name: _checker(hint) for name, hint in _hints(record).items()}
    required = tests.keys() - _optional(record)
    return lambda value: (
        isinstance(value, dict)
        and value.keys() >= required
        and all(tests[name](value[name]) for name in tests.keys() & value.keys())
    )


def _is_moderate(value: float) -> bool:
    return -_LARGEST < value < _LARGEST if type(value) is int else math.isfinite(value)


# By keyword of JSON Schema: whether a value satisfies the bound.
_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda bound, value: bool(value >= bound),
    "exclusiveMinimum": lambda bound, value: bool(value > bound),
    "maximum": lambda bound, value: bool(value <= bound),
    "enum": lambda bound, value: value in (bound() if callable(bound) else bound),
    "oneKeyOf": lambda bound, value: len(value) <= 1 and value.keys() <= set(bound),
}


def json_schema(expected: Any) -> dict[str, Any]:
    """The JSON Schema (2020-12) of an annotated type, as :func:`build_dataclass` checks it.

    A dataclass or a TypedDict is an object whose fields without a default are required.  In ``Annotated`` a
    text is the description, and a pair is a keyword of JSON Schema with its value.  The values of ``enum``
    may be a function; ``("oneKeyOf", names)`` means a dictionary of texts with at most one of
    these keys.
    """
    kind, inner = get_origin(expected), get_args(expected)
    if kind is Annotated:
        schema = json_schema(inner[0])
        for note in inner[1:]:
            schema |= {"description": note} if isinstance(note, str) else _keyword(*note)
        return schema
    if kind is NotRequired:
        return json_schema(inner[0])
    if kind is Literal:
        return {"const": inner[0]} if len(inner) == 1 else {"enum": list(inner)}
    if kind in (tuple, list):
        return {"type": "array"} | _items(inner if kind is tuple else (*inner, ...))
    if kind is dict:
        return {"type": "object"} | (
            {} if inner[1] is Any else {"additionalProperties": json_schema(inner[1])}
        )
    if inner:
        return _union([json_schema(option) for option in inner])
    if expected in _JSON_TYPES:
        return {"type": _JSON_TYPES[expected]}
    return _object(expected)


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _keyword(keyword: str, value: Any) -> dict[str, Any]:
    if keyword == "oneKeyOf":
        properties = {name: {"type": "string"} for name in value}
        return {"properties": properties, "additionalProperties": False, "maxProperties": 1}
    if keyword == "enum":
        return {"enum": list(value() if callable(value) else value)}
    return {keyword: value}


def _items(parts: tuple[Any, ...]) -> dict[str, Any]:
    """The schema of an array of any length, or with one value for each part."""
    if parts[-1] is ...:
        return {"items": json_schema(parts[0])}
    schemas = [json_schema(part) for part in parts]
    alike = all(schema == schemas[0] for schema in schemas)
    each = {"items": schemas[0]} if alike else {"prefixItems": schemas}
    return {**each, "minItems": len(parts), "maxItems": len(parts)}


def _union(options: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema with several types; of objects with fields of their own, alternatives."""
    if any("properties" in option for option in options):
        return {"anyOf": options}
    merged = {keyword: value for option in options for keyword, value in option.items()}
    return {**merged, "type": [option["type"] for option in options]}


def _object(record: Any) -> dict[str, Any]:
    if record is Any:
        return {}
    hints, optional = _hints(record), _optional(record)
    properties = {name: json_schema(hint) for name, hint in hints.items()}
    required = [name for name in hints if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _optional(record: Any) -> set[str]:
    """The fields of a dataclass or a TypedDict that may be missing."""
    if not is_dataclass(record):
        hints = _hints(record)
        return {n for n, hint in hints.items() if not record.__total__ or get_origin(hint) is NotRequired}
    defaults = {field.name: (field.default, field.default_factory) for field in fields(record)}
    return {name for name, both in defaults.items() if both != (MISSING, MISSING)}
