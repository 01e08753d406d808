"""Options that are written as text: sizes and shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mpoc.errors import UsageError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_LONGEST = 1000  # characters: none that is meant has more
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


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
