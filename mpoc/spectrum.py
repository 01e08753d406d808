"""Schmidt spectra as a file keeps them: a few points of each.  No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# (index from 1, Schmidt value) pairs, the squares of all values of the bond summing to 1.
Spectrum = tuple[tuple[int, float], ...]

MOST_POINTS = 32


def thinned(values: Sequence[float], kept: int) -> Spectrum:
    """At most ``MOST_POINTS`` of a bond's Schmidt values, evenly spaced on a logarithmic index.

    Args:
        values: all of them, descending, of any norm.
        kept: how many a truncation keeps, 1 ≤ kept ≤ their number.

    Returns:
        The first, the last that is kept and the last of all are always among them; six significant digits.
        None of a weight of zeros.
    """
    norm = math.sqrt(math.fsum(value * value for value in values))
    if norm == 0.0:
        return ()
    indices = _indices(len(values), kept)
    return tuple((index, float(f"{values[index - 1] / norm:.6g}")) for index in indices)


def longest(count: int, figure: float) -> Spectrum:
    """As many points as :func:`thinned` can leave of ``count`` values, each at its longest."""
    return ((count, figure),) * min(count, len(_indices(count, 1)) + 1)


def _indices(count: int, kept: int) -> list[int]:
    steps = MOST_POINTS - 2
    spaced = {round(count ** (step / steps)) for step in range(steps + 1)}
    return list(range(1, count + 1)) if count <= MOST_POINTS else sorted(spaced | {kept})


def check_spectrum(spectrum: Spectrum, longest: int) -> None:
    """Whether these can be points of a bond's spectrum of at most ``longest`` values.

    Raises:
        ValueError: they cannot.
    """
    indices, values = [index for index, _ in spectrum], [value for _, value in spectrum]
    rising = all(before < after for before, after in itertools.pairwise(indices))
    falling = all(before >= after for before, after in itertools.pairwise(values))
    within = 0 < len(spectrum) <= MOST_POINTS and indices[0] == 1 and indices[-1] <= longest
    if not (within and rising and falling and values[0] <= 1.0 and values[-1] >= 0.0):
        raise ValueError(f"a spectrum of {len(spectrum)} points, from {spectrum[:1]} to {spectrum[-1:]}")
