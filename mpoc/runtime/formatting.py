"""Numbers as people and files write them: bytes, factors, six significant digits."""

from __future__ import annotations

import re

from mpoc.errors import UsageError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_LONGEST = 1000  # characters of a size that is read


def rounded(value: float) -> float:
    """Six significant digits: what the manifest keeps."""
    return float(f"{value:.6g}")


def times(numbers: tuple[int, ...] | list[int]) -> str:
    """``(4, 8, 8)`` → ``4×8×8``."""
    return "×".join(map(str, numbers))


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``, ``1,000 layers``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: int) -> str:
    """``3471733`` → ``3.47 MB`` (powers of 1000)."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:  # what would round to four digits goes to the next unit
            break
        size, unit = size / 1000, larger
    return f"{int(size)} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def parse_size(value: str | int) -> int:
    """``"20MB"`` → bytes; kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        UsageError: not a size.
    """
    from fractions import Fraction

    text = str(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text[:_LONGEST], re.IGNORECASE)
    unit = (match[2] or "b").lower() if match else ""
    if not match or unit not in _UNITS or len(text) > _LONGEST:
        raise UsageError(f"{text[:_LONGEST]!r} is not a size", "write it as 20MB, 500kB or 1.5GB")
    return int(Fraction(match[1]) * _UNITS[unit])
