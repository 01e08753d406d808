"""Numbers as people and files write them: bytes, factors, six significant digits."""

from __future__ import annotations


def rounded(value: float) -> float:
    """Six significant digits: what the manifest keeps."""
    return float(f"{value:.6g}")


def times(numbers: tuple[int, ...] | list[int]) -> str:
    """``(4, 8, 8)`` → ``4×8×8``."""
    return "×".join(map(str, numbers))


def human_bytes(count: int) -> str:
    """``3471733`` → ``3.47 MB`` (powers of 1000)."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:  # what would round to four digits goes to the next unit
            break
        size, unit = size / 1000, larger
    return f"{int(size)} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
