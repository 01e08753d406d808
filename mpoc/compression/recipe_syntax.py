"""Values of a TOML file as the type they should have; each raises TypeError where it is another.

Options that are written as text: sizes and shapes.

``--input-shape``: the size at which a convolution becomes one map, and what no checkpoint says of it.

A recipe file: TOML to checked values, by the names of the options.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from mpoc.compression.selection import matches
from mpoc.errors import UsageError, nearest, shortened
from mpoc.io.validation import read_bounded
from mpoc.tensor_networks.factors import OrderRule, parse_order
from mpoc.tensor_networks.geometry import Geometry, make_geometry

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_LONGEST = 1000  # characters: none that is meant has more
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_NUMBERS = ("stride", "padding", "dilation")
_KEYS = (*_NUMBERS, "groups", "padding_mode")
_FORM = re.compile(
    r"(?:(?!\d+(?:x\d+)*:)(?P<pattern>.+?)=)?"
    r"(?P<size>\d+(?:x\d+)*)(?::(?P<settings>\w+=\w+(?:,\w+=\w+)*))?"
)


def whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise TypeError("a whole number is needed")
    return value


def number(value: Any) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number is needed")
    return float(value)


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError("true or false is needed")
    return value


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError("a string is needed")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A string or a list of strings, as a tuple."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise TypeError("a string or a list of strings is needed")
    return tuple(items)


@dataclass(frozen=True)
class ShapeRule:
    """``--shape [PATTERN=]INPUTS:OUTPUTS``."""

    pattern: str | None  # None: every layer whose sides these factors multiply out to
    output_factors: tuple[int, ...]
    input_factors: tuple[int, ...]


def parse_size(value: str | int) -> int:
    """``"20MB"`` → bytes; kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        UsageError: not a size.
    """
    text = str(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text[:_LONGEST], re.IGNORECASE)
    unit = (found[2] or "b").lower() if found else ""
    if not found or unit not in _UNITS or len(text) > _LONGEST:
        raise UsageError(f"{text[:_LONGEST]!r} is not a size", "write it as 20MB, 500kB or 1.5GB")
    return int(Fraction(found[1]) * _UNITS[unit])


def parse_shape(text: str) -> ShapeRule:
    """``"[PATTERN=]4x7x7x4:4x4x4x4"``: input factors, colon, output factors.

    Raises:
        UsageError: not of that form.
    """
    pattern, equals, factors = text.rpartition("=")
    found = re.fullmatch(r"(\d+(?:x\d+)*):(\d+(?:x\d+)*)", factors.strip())
    if not found or (equals and not pattern) or len(factors) > _LONGEST:
        raise UsageError(
            f"{text[:_LONGEST]!r} is not a shape", "inputs:outputs, as in --shape 'fc1=4x7x7x4:4x4x4x4'"
        )
    inputs, outputs = (tuple(int(n) for n in side.split("x")) for side in found.groups())
    if 0 in inputs + outputs:
        raise UsageError(f"{text!r}: a factor of 0")
    return ShapeRule(pattern or None, outputs, inputs)


@dataclass(frozen=True)
class InputShape:
    """``[PATTERN=]HxW[:stride=1,padding=1,dilation=1,groups=1,padding_mode=zeros]``, numbers as HxW too."""

    pattern: str | None  # None: every convolution
    size: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] | None = None  # None: dilation · (k − 1) / 2
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    padding_mode: str = "zeros"

    def geometry(self, shape: tuple[int, ...]) -> Geometry:
        """Of the convolution with a kernel of ``shape``.

        Raises:
            UsageError: it does not fit.
        """
        return make_geometry(
            shape, self.size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        )


def geometry_at(name: str, shape: tuple[int, ...], given: Iterable[InputShape]) -> Geometry:
    """The geometry of the convolution ``name`` with a kernel of ``shape``: the last that names it counts.

    Raises:
        UsageError: none does, or it does not fit.
    """
    found = [rule for rule in given if rule.pattern is None or matches(rule.pattern, name)]
    if not found:
        layer = name.removesuffix(".weight")
        raise UsageError(
            "as one map (--conv map) a convolution needs its input size",
            f"--input-shape '{layer}=HxW', or leave it alone: --exclude '{layer}'",
        )
    return found[-1].geometry(shape)


def parse_input_shape(text: str) -> InputShape:
    """The text of ``--input-shape`` as plain data.

    Raises:
        UsageError: not of that form.
    """
    found = _FORM.fullmatch(text.strip()) if len(text) < _LONGEST else None
    if not found:
        raise UsageError(
            f"{text[:_LONGEST]!r} is not an input shape",
            "height x width and, where they differ, settings: --input-shape 'conv5*=2x2:stride=1,padding=1'",
        )
    settings = dict(pair.split("=") for pair in (found["settings"] or "").split(",") if pair)
    for key in settings:
        if key not in _KEYS:
            raise UsageError(f"{text!r}: unknown setting {key!r}{nearest(key, _KEYS)}")
    numbers = {key: _numbers(text, settings[key]) for key in _NUMBERS if key in settings}
    groups = _numbers(text, settings.get("groups", "1"))
    if len(groups) != 1:
        raise UsageError(f"{text!r}: groups is one number")
    size, mode = _numbers(text, found["size"]), settings.get("padding_mode", "zeros")
    return InputShape(found["pattern"], size, groups=groups[0], padding_mode=mode, **numbers)


def _numbers(text: str, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", value):
        raise UsageError(f"{text!r}: {value!r} is no number, nor numbers as 2x1")
    return tuple(map(int, value.split("x")))


def read_recipe(file: Path, recipe: type, rule: type) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options of a recipe file and, by pattern, those of its layers' tables, by the names of fields.

    Args:
        file: TOML.
        recipe, rule: dataclasses whose fields are the keys that are known.

    Raises:
        UsageError: no such file, not TOML, unknown or badly typed keys.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such recipe file")
    try:
        raw = tomllib.loads(read_bounded(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid TOML ({shortened(error)})") from error
    tables = raw.pop("layer", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UsageError(f'{file}: layers are tables, as in [layer."encoder.*"]')
    values = _typed(raw, recipe, f"{file}")
    rules = {pattern: _table(pattern, table, rule, file) for pattern, table in tables.items()}
    return values, rules


def _table(pattern: str, table: dict[str, Any], rule: type, file: Path) -> dict[str, Any]:
    """A layer's table; of options with patterns of their own it holds one value without."""
    where = f"{file}: [layer.{pattern!r}]"
    values = _typed(table, rule, where)
    for key, form in (("shape", "inputs:outputs"), ("input_shape", "HxW"), ("order", "order")):
        if key in values:
            if len(values[key]) != 1 or values[key][0].pattern is not None:
                name = key.replace("_", "-")
                raise UsageError(f"{where}: {name}: one {form}, the table names the layers")
            values[key] = values[key][0]
    return values


def _typed(raw: Mapping[str, Any], target: type, where: str) -> dict[str, Any]:
    """Checked values for ``target``'s fields from a TOML table."""
    known = [f.name.replace("_", "-") for f in fields(target) if f.name not in ("pattern", "rules")]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            raise UsageError(f"{where}: a table in a table", 'quote dotted names: [layer."layer1.0.conv1"]')
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        try:
            values[key.replace("-", "_")] = _READERS[key](value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{where}: {key} = {shortened(value)}: {error}") from error
        except UsageError as error:
            raise UsageError(f"{where}: {key}: {error}", error.hint) from error
    return values


def _shapes(value: Any) -> tuple[ShapeRule, ...]:
    return tuple(parse_shape(text) for text in texts(value))


def _orders(value: Any) -> tuple[OrderRule, ...]:
    return tuple(parse_order(text) for text in texts(value))


def _input_shapes(value: Any) -> tuple[InputShape, ...]:
    return tuple(parse_input_shape(text) for text in texts(value))


def _size(value: Any) -> int:
    return parse_size(value if isinstance(value, str) else whole(value))


_READERS = {
    "bond": whole,
    "ratio": number,
    "max-error": number,
    "discard": number,
    "size": _size,
    "max-drop": number,
    "form": text,
    "sites": whole,
    "shape": _shapes,
    "order": _orders,
    "conv": text,
    "input-shape": _input_shapes,
    "layers": texts,
    "exclude": texts,
    "embeddings": flag,
    "min-params": whole,
    "allow-growth": flag,
    "dtype": text,
    "seed": whole,
    "device": text,
    "max-shard-size": _size,
    "dense": flag,
}
