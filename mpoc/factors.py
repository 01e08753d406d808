"""Whole numbers as products of nearly equal factors, or of a small and a large one: the sides of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from mpoc.geometry import Geometry

# An exact factorisation is kept unless its factors sum to more than this many times the padded one's.
_EXACT_BONUS = 2.0
_WIDEST_PADDING = 0.1
_MOST_TRIED = 1 << 15


@cache
def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """``count`` rising factors, each at least 2, of ``size`` or of a slightly larger padded size.

    Empty where even 10 % of padding finds none.
    """
    exact = most_balanced(size, count)
    candidates = range(size + 1, min(int(size * (1 + _WIDEST_PADDING)), size + _MOST_TRIED) + 1)
    limit = 2 * math.ceil(size ** (1 / count)) + 1
    ideal = count * size ** (1 / count)
    if exact and sum(exact) <= 1.25 * ideal:
        return exact  # no padding can be much better

    def cost(factors: tuple[int, ...]) -> float:
        return math.prod(factors) / size * sum(factors)

    padded = [f for n in candidates if (f := most_balanced(n, count, limit))]
    best = min(padded, key=cost, default=())
    if exact and (not best or cost(exact) <= _EXACT_BONUS * cost(best)):
        return exact
    return best


def most_balanced(size: int, count: int, limit: int | None = None) -> tuple[int, ...]:
    """The factorisation into ``count`` rising factors ≥ 2 (≤ ``limit``) with the smallest sum, or ()."""
    return min(_factorisations(size, count, 2, limit or size), key=sum, default=())


def _factorisations(size: int, count: int, least: int, limit: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        if least <= size <= limit:
            yield (size,)
        return
    for factor in range(least, min(limit, int(size ** (1 / count) + 1e-9)) + 1):
        if size % factor == 0:
            for rest in _factorisations(size // factor, count - 1, factor, limit):
                yield (factor, *rest)


def wide_factors(outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Two sites, one nearly all outputs and the other nearly all inputs: (2, N_y/2) and (N_x/2, 2).

    Of genuine MPOs those that come closest to a layer's outputs at equal size; None where a side is a prime.
    """
    j, i = _least_factor(outputs), _least_factor(inputs)
    return None if j == outputs or i == inputs else ((j, outputs // j), (inputs // i, i))


def _least_factor(size: int) -> int:
    return next((k for k in range(2, math.isqrt(size) + 1) if size % k == 0), size)


def default_sites(outputs: int, inputs: int) -> int:
    """The papers' habit: four sites where the larger side is under 1,024, five from there."""
    wanted = 4 if max(outputs, inputs) < 1024 else 5
    return max(1, min(wanted, int(math.log2(max(2, min(outputs, inputs))))))


def mera_sites(outputs: int, inputs: int) -> int:
    """Sites of about 4 on the larger side: what a MERA has over a chain are levels of small ones."""
    wanted = (max(1, outputs - 1, inputs - 1).bit_length() + 1) // 2
    return max(1, min(wanted, int(math.log2(max(2, min(outputs, inputs))))))


def choose_factors(outputs: int, inputs: int, sites: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output factors, input factors): outputs fall and inputs rise, so that all sites are alike in size.

    Args:
        outputs: N_y.
        inputs: N_x.
        sites: wanted number; None for the papers' habit. Fewer where a side is too small, or prime.
    """
    most = int(math.log2(1.1 * max(2, min(outputs, inputs)))) + 1  # a factor of 2 at least to each
    wanted = min(sites, most) if sites is not None else default_sites(outputs, inputs)
    for count in range(wanted, 1, -1):
        found = balanced_factors(outputs, count), balanced_factors(inputs, count)
        if found[0] and found[1]:
            return found[0][::-1], found[1]
    return (outputs,), (inputs,)


def choose_map_factors(
    geometry: Geometry, channels: tuple[int, int], sites: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sites of their own for each axis, channels last, that no factor crosses; neighbours merged if too many.

    Nothing is padded.  Unless asked for fewer, a large map has more sites than the papers' habit: a factor of
    at most about 8 in height and width, and three sites for the channels.
    """
    positions = geometry.positions
    outputs, inputs = (count * each for count, each in zip(positions, channels, strict=True))
    pairs: list[tuple[int, int]] = []
    for pair in zip(geometry.output_size, geometry.size, strict=True):
        if max(pair) > 1:
            pairs += _exact_pairs(*pair, math.ceil(math.log2(max(pair)) / 3))
    habit = default_sites(outputs, inputs) if sites is None else sites
    least = min(3, default_sites(*channels)) if sites is None else 1
    found = _exact_pairs(*channels, max(least, habit - len(pairs)))
    # Shifts keep most digits of a position, so positions match digit by digit; channels balance the sites.
    pairs += zip((j for j, _ in reversed(found)), (i for _, i in found), strict=True)
    while sites is not None and len(pairs) > sites:
        k = min(range(len(pairs) - 1), key=lambda k: math.prod(pairs[k] + pairs[k + 1]))
        (j, i), (more_j, more_i) = pairs[k : k + 2]
        pairs[k : k + 2] = [(j * more_j, i * more_i)]
    return tuple(j for j, _ in pairs), tuple(i for _, i in pairs)


def _exact_pairs(outputs: int, inputs: int, count: int) -> list[tuple[int, int]]:
    """Rising factors (J, I) of at most ``count`` sites that multiply out to the two sides exactly."""
    for number in range(count, 1, -1):
        found = most_balanced(outputs, number), most_balanced(inputs, number)
        if found[0] and found[1]:
            return list(zip(*found, strict=True))
    return [(outputs, inputs)]
