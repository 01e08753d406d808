"""Values of a recipe as text: shares, factors and input shapes of the command line, and recipe files in TOML.

Each parser raises :class:`mpoc.errors.UsageError` with the text it was given. A recipe file has the options'
names as keys; the fields of the recipe's dataclass say how a value is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mpoc.compression.selection import matches
from mpoc.errors import UsageError, nearest, shortened
from mpoc.io.validation import read_bounded
from mpoc.runtime.options import Option
from mpoc.tensor_networks.geometry import Geometry, make_geometry

_LONGEST = 1000  # characters: none that is meant has more
_NUMBERS = ("stride", "padding", "dilation")
_KEYS = (*_NUMBERS, "groups", "padding_mode")
_FORM = re.compile(
    r"(?:(?!\d+(?:x\d+)*:)(?P<pattern>.+?)=)?"
    r"(?P<size>\d+(?:x\d+)*)(?::(?P<settings>\w+=\w+(?:,\w+=\w+)*))?"
)


@dataclass(frozen=True)
class ShapeRule:
    """``--shape [PATTERN=]INPUTS:OUTPUTS``."""

    pattern: str | None  # None: every layer whose sides these factors multiply out to
    output_factors: tuple[int, ...]
    input_factors: tuple[int, ...]


def parse_share(text: str) -> float:
    """``"0.5"`` → 0.5.

    Raises:
        UsageError: not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text[:_LONGEST]!r} is not a number", "write a share as 0.5, not 50%") from None


def parse_shape(text: str) -> ShapeRule:
    """``"[PATTERN=]4x7x7x4:4x4x4x4"``: input factors, colon, output factors.

    Raises:
        UsageError: not of that form.
    """
    pattern, equals, factors = text.rpartition("=")
    match = re.fullmatch(r"(\d+(?:x\d+)*):(\d+(?:x\d+)*)", factors.strip())
    if not match or (equals and not pattern) or len(factors) > _LONGEST:
        raise UsageError(
            f"{text[:_LONGEST]!r} is not a shape", "inputs:outputs, as in --shape 'fc1=4x7x7x4:4x4x4x4'"
        )
    inputs, outputs = (tuple(int(n) for n in side.split("x")) for side in match.groups())
    if 0 in inputs + outputs:
        raise UsageError(f"{text!r}: factors must be positive, got 0")
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
        """The geometry of a convolution with a kernel of ``shape`` (C_out, C_in, …).

        Raises:
            UsageError: it does not fit the kernel.
        """
        return make_geometry(
            shape, self.size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        )


def geometry_at(name: str, shape: tuple[int, ...], given: Iterable[InputShape]) -> Geometry:
    """The geometry of the convolution ``name`` with a kernel of ``shape``; the last matching rule wins.

    Raises:
        UsageError: no rule matches, or it does not fit the kernel.
    """
    matching = [rule for rule in given if rule.pattern is None or matches(rule.pattern, name)]
    if not matching:
        layer = name.removesuffix(".weight")
        raise UsageError(
            "as one map (--conv map) a convolution needs its input size",
            f"--input-shape '{layer}=HxW', or leave it alone: --exclude '{layer}'",
        )
    return matching[-1].geometry(shape)


def parse_input_shape(text: str) -> InputShape:
    """``"[PATTERN=]HxW[:stride=1,…]"`` as plain data.

    Raises:
        UsageError: not of that form.
    """
    match = _FORM.fullmatch(text.strip()) if len(text) < _LONGEST else None
    if not match:
        raise UsageError(
            f"{text[:_LONGEST]!r} is not an input shape",
            "height x width, then settings that differ from the defaults: "
            "--input-shape 'conv5*=2x2:stride=1,padding=1'",
        )
    settings = dict(pair.split("=") for pair in (match["settings"] or "").split(",") if pair)
    for key in settings:
        if key not in _KEYS:
            raise UsageError(f"{text!r}: unknown setting {key!r}{nearest(key, _KEYS)}")
    numbers = {key: _numbers(text, settings[key]) for key in _NUMBERS if key in settings}
    groups = _numbers(text, settings.get("groups", "1"))
    if len(groups) != 1:
        raise UsageError(f"{text!r}: groups must be one number")
    size, mode = _numbers(text, match["size"]), settings.get("padding_mode", "zeros")
    return InputShape(match["pattern"], size, groups=groups[0], padding_mode=mode, **numbers)


def _numbers(text: str, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", value):
        raise UsageError(f"{text!r}: {value!r} is neither a number nor numbers such as 2x1")
    return tuple(map(int, value.split("x")))


def read_recipe(file: Path, recipe: type, rule: type) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options of a recipe file and, by pattern, those of its layers' tables, by the names of fields.

    Args:
        file: TOML.
        recipe: dataclass whose fields are the keys of the file.
        rule: dataclass whose fields are the keys of a layer's table.

    Raises:
        UsageError: no such file, not TOML, unknown or badly typed keys.
    """
    import tomllib

    if not file.is_file():
        raise UsageError(f"{file}: no such recipe file")
    try:
        raw = tomllib.loads(read_bounded(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid TOML ({shortened(error)})") from error
    tables = raw.pop("layer", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UsageError(f'{file}: layers are tables, as in [layer."encoder.*"]')
    readers = _readers(recipe)
    values = _typed(raw, readers, f"{file}")
    keys = [f.name for f in fields(rule) if f.name != "pattern"]
    readers = {key: readers.get(key, _flag) for key in keys}
    return values, {pattern: _table(pattern, table, readers, file) for pattern, table in tables.items()}


def _table(pattern: str, table: dict[str, Any], readers: Mapping[str, _Reader], file: Path) -> dict[str, Any]:
    """A layer's table; an option that has patterns of its own gets one value without a pattern here."""
    where = f"{file}: [layer.{pattern!r}]"
    values = _typed(table, readers, where)
    for key, form in (("shape", "inputs:outputs"), ("input_shape", "HxW"), ("order", "order")):
        if key in values:
            if len(values[key]) != 1 or values[key][0].pattern is not None:
                name = key.replace("_", "-")
                raise UsageError(f"{where}: {name}: one {form}, the table names the layers")
            values[key] = values[key][0]
    return values


def _typed(raw: Mapping[str, Any], readers: Mapping[str, _Reader], where: str) -> dict[str, Any]:
    """Checked values of a TOML table."""
    known = [name.replace("_", "-") for name in readers]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            raise UsageError(f"{where}: a table in a table", 'quote dotted names: [layer."layer1.0.conv1"]')
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        name = key.replace("-", "_")
        try:
            values[name] = readers[name](value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{where}: {key} = {shortened(value)}: {error}") from error
        except UsageError as error:
            raise UsageError(f"{where}: {key}: {error}", error.hint) from error
    return values


def _readers(recipe: type) -> dict[str, _Reader]:
    """By the names of a dataclass's options, what reads a TOML value; it raises TypeError where it cannot."""
    hints = get_type_hints(recipe)
    options = {f.name: f.metadata["option"] for f in fields(recipe) if "option" in f.metadata}
    return {name: partial(_read, option, hints[name]) for name, option in options.items()}


def _read(option: Option, hint: Any, value: Any) -> Any:
    if option.repeated:
        return tuple(option.parse(text) if option.parse else text for text in _texts(value))
    kind = next(kind for kind in (int, float, bool, str) if kind in (hint, *get_args(hint)))
    if kind is int and option.parse and isinstance(value, str):
        return option.parse(value)
    return _BY_TYPE[kind](value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise TypeError("a whole number is needed")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number is needed")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false is needed")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a string is needed")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise TypeError("a string or a list of strings is needed")
    return tuple(items)


_Reader = Callable[[Any], Any]
_BY_TYPE: dict[type, _Reader] = {int: _whole, float: _number, bool: _flag, str: _text}
