"""A recipe file: TOML to checked values, by the names of the options."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError, nearest, shortened
from mpoc.input_shape import InputShape, parse_input_shape
from mpoc.option_text import ShapeRule, parse_shape, parse_size
from mpoc.orders import OrderRule, parse_order
from mpoc.strict_json import read_bounded
from mpoc.toml_values import flag, number, text, texts, whole


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
