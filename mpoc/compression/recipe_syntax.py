"""Parse and check what a recipe holds: numbers, factors and input shapes as text, and recipe files in TOML.

Each parser raises :class:`mpoc.errors.UsageError` with the text it was given. A recipe file has the options'
names as keys; the fields of the recipe's dataclass say how a value is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from mpoc.compression.selection import matches
from mpoc.errors import UsageError, command_line, excluding, nearest, shortened
from mpoc.io.validation import check_fields, read_bounded
from mpoc.quantize.storage import GRID_BITS
from mpoc.runtime.formatting import parse_size
from mpoc.runtime.options import Option
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import Geometry, make_geometry

if TYPE_CHECKING:
    from mpoc.compression.recipe import LayerRule, Recipe

_LONGEST = 1000  # characters: none that is meant has more
STORAGES = ("grid", "coded", "float")
_NUMBERS = ("stride", "padding", "dilation")
_KEYS = (*_NUMBERS, "groups", "padding_mode")
_FORM = re.compile(
    r"(?:(?!\d+(?:x\d+)*:)(?P<pattern>.+?)=)?"
    r"(?P<size>\d+(?:x\d+)*)(?::(?P<settings>\w+=\w+(?:,\w+=\w+)*))?"
)
CONV_FORMS = ("kernel", "map")


def check_bond(where: str, bond: int | None) -> None:
    """Check a bond dimension; ``where`` begins the message.

    Raises:
        UsageError: it is not positive.
    """
    if bond is not None and bond < 1:
        raise UsageError(f"{where} {bond}: the bond dimension must be positive")


def check_share(where: str, share: float | None) -> None:
    """Check a share of something; ``where`` begins the message.

    Raises:
        UsageError: it does not lie between 0 and 1.
    """
    if share is not None and not 0 < share < 1:
        raise UsageError(f"{where} {share}: must lie between 0 and 1")


def check_sites(where: str, sites: int | None) -> None:
    """Check a number of sites; ``where`` begins the message.

    Raises:
        UsageError: it is below 2.
    """
    if sites is not None and sites < 2:
        raise UsageError(f"{where} {sites}: a matrix product operator needs at least 2 sites")


def check_storage(where: str, storage: str | None, bits: int | None, in_size: bool = False) -> None:
    """Check how numbers are to be stored: ``grid`` and ``coded`` take bits, ``float`` takes none.

    Args:
        where: the beginning of a message, as ``"--"``.
        storage: one of ``STORAGES``; None: not given.
        bits: of a number; None: not given.
        in_size: a budget of bytes finds the bits that are not given.

    Raises:
        UsageError: another storage or number of bits, or they do not go together.
    """
    if storage is not None and storage not in STORAGES:
        known = ", ".join(STORAGES)
        raise UsageError(f"{where}storage {storage!r}: not one of {known}{nearest(storage, STORAGES)}")
    if bits is not None and bits not in GRID_BITS:
        raise UsageError(f"{where}bits {bits}: must be one of {', '.join(map(str, GRID_BITS))}", "--bits 4")
    if storage == "float" and bits is not None:
        raise UsageError(f"{where}storage float is not rounded to bits, got bits {bits}", "--storage grid")
    if storage in ("grid", "coded") and bits is None and not in_size:
        raise UsageError(f"{where}storage {storage} requires bits", f"--bits 4 --storage {storage}")


def network_options(given: Recipe | LayerRule) -> list[str]:
    """The options given that say how layers become tensor networks."""
    names = ("form", "sites", "shape", "order")
    return [name for name in names if getattr(given, name)] + ["conv map"] * (given.conv == "map")


def check_conv(forms: Sequence[str], has_input_shapes: bool) -> None:
    """Check how convolutions are to be factorised.

    Raises:
        UsageError: there is no such way, or sizes of inputs are given for whole maps that nobody asks for.
    """
    for form in forms:
        if form not in CONV_FORMS:
            raise UsageError(
                f"--conv {form!r}: not one of {', '.join(CONV_FORMS)}{nearest(form, CONV_FORMS)}"
            )
    if "map" not in forms and has_input_shapes:
        raise UsageError("--input-shape requires --conv map", "--conv map")


def check_form(where: str, form: str | None, sites: int | None, bond: int | None = None) -> None:
    """Check a form, and what is asked for beside it.

    Raises:
        UsageError: there is no such form, or it takes no sites or no bond.
    """
    known = [*FORMS, "auto"]
    if form is None:
        return
    if form not in known:
        raise UsageError(f"{where} {form!r}: not one of {', '.join(known)}{nearest(form, known)}")
    if form != "auto" and FORMS[form].one_matrix and sites is not None:
        raise UsageError(f"{where} {form}: has two factors, so it takes no number of sites", "--form mpo")
    if (form == "auto" or FORMS[form].parts) and bond is not None:
        raise UsageError(f"{where} {form}: takes a share of a budget, not a bond", "form mpo, or svd")


def check_rule(where: str, rule: LayerRule) -> None:
    """Check the options for single layers; ``where`` begins the message.

    Raises:
        UsageError: a value out of range, or two that exclude each other.
    """
    check_bond(f"{where} bond", rule.bond)
    check_share(f"{where} max-error", rule.max_error)
    check_share(f"{where} discard", rule.discard)
    if rule.max_error is not None and rule.discard is not None:
        raise UsageError(f"{where} max-error and discard exclude each other")
    check_sites(f"{where} sites", rule.sites)
    check_form(f"{where} form", rule.form, rule.sites, rule.bond)


@dataclass(frozen=True)
class ShapeRule:
    """``--shape [PATTERN=]INPUTS:OUTPUTS``."""

    pattern: str | None  # None: every layer whose sides these factors multiply out to
    output_factors: tuple[int, ...]
    input_factors: tuple[int, ...]


def parse_share(text: str) -> float:
    """``"0.5"`` or ``"50%"`` → 0.5.

    Raises:
        UsageError: not a number.
    """
    number = text.strip()
    try:
        return round(float(number[:-1]) / 100, 15) if number.endswith("%") else float(number)
    except ValueError:
        raise UsageError(f"{text[:_LONGEST]!r} is not a number", "write a share as 0.5 or 50%") from None


def parse_budget(value: str | int | float) -> int | float:
    """``"20MB"`` → bytes (an int), ``"25%"`` → a share of the source's weight files (a float).

    Raises:
        UsageError: neither, or a share that is not above 0 and at most 100 %.
    """
    text = str(value).strip()
    if isinstance(value, float):
        return value
    if not text.endswith("%"):
        if re.fullmatch(r"0?\.\d*", text):
            raise UsageError(f"{text[:_LONGEST]}: neither bytes nor a share", "write it as 20MB or 25%")
        return parse_size(value)
    share = parse_share(text)
    if not 0 < share <= 1:
        raise UsageError(f"{text[:_LONGEST]!r}: a share must be above 0 % and at most 100 %")
    return share


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
            f"{command_line('--input-shape', layer + '=HxW')}, or leave it alone: {excluding(layer)}",
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
    """Read a recipe file: its options and, by pattern, those of its layers' tables, as values of fields.

    Args:
        file: TOML.
        recipe: dataclass whose options are the keys of the file.
        rule: dataclass whose fields, but for the pattern, are the keys of a layer's table.

    Raises:
        UsageError: the file is missing or not TOML, or a key is unknown or has a value of the wrong type.
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
    options = {f.name: f.metadata["option"] for f in fields(recipe) if "option" in f.metadata}
    of_layer = {f.name: options.get(f.name) for f in fields(rule) if f.name != "pattern"}
    rules = {
        pattern: _values(t, rule, of_layer, f"{file}: [layer.{pattern!r}]") for pattern, t in tables.items()
    }
    return _values(raw, recipe, options, f"{file}"), rules


def _values(
    raw: Mapping[str, Any], record: type, options: Mapping[str, Option | None], where: str
) -> dict[str, Any]:
    """The values of a TOML table, checked against the fields of ``record``."""
    names = {name.replace("_", "-"): name for name in options}
    hints = get_type_hints(record)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            raise UsageError(f"{where}: a table in a table", 'quote dotted names: [layer."layer1.0.conv1"]')
        if key not in names:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, list(names))}")
        name, option = names[key], options[names[key]]
        try:
            values[name] = value if option is None else _parsed(value, option, hints[name])
        except UsageError as error:
            raise UsageError(f"{where}: {key}: {error}", error.hint) from error
        try:
            check_fields({name: values[name]}, record)
        except TypeError as error:
            wanted = _wanted(option, hints[name])
            raise UsageError(f"{where}: {key} = {shortened(value)}: must be {wanted}") from error
    return values


def _parsed(value: Any, option: Option, hint: Any) -> Any:
    """A TOML value as the option's field holds it; a value of another type is left as it is."""
    kinds = (hint, *get_args(hint))
    if option.repeated:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return value
        items = tuple(map(option.parse, texts)) if option.parse else tuple(texts)
        if get_origin(hint) is tuple:
            return items
        return items[0] if len(items) == 1 and items[0].pattern is None else items
    if option.parse and isinstance(value, str):
        return option.parse(value)
    is_whole = type(value) is int and int not in kinds and abs(value) < 1 << 63
    return float(value) if float in kinds and is_whole else value


def _wanted(option: Option | None, hint: Any) -> str:
    """Describe the values that this field takes."""
    if option is not None and option.repeated:
        if get_origin(hint) is tuple:
            return "a string or a list of strings"
        return f"one {(option.metavar or '').removeprefix('[PATTERN=]')} without a pattern, in quotes"
    kinds = (hint, *get_args(hint))
    return next(words for kind, words in _WORDS.items() if kind in kinds)


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
