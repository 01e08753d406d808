"""``--input-shape``: the size at which a convolution becomes one map, and what no checkpoint says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mpoc.errors import UsageError, nearest
from mpoc.geometry import Geometry, make_geometry
from mpoc.selection import matches

_NUMBERS = ("stride", "padding", "dilation")
_KEYS = (*_NUMBERS, "groups", "padding_mode")
_LONGEST = 1000  # characters: none that is meant has more
_FORM = re.compile(
    r"(?:(?!\d+(?:x\d+)*:)(?P<pattern>.+?)=)?"
    r"(?P<size>\d+(?:x\d+)*)(?::(?P<settings>\w+=\w+(?:,\w+=\w+)*))?"
)


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
