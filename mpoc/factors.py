"""Whole numbers as products of nearly equal factors, or of a small and a large one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

# An exact factorisation is kept unless its factors sum to more than this many times the padded one's.
_EXACT_BONUS = 2.0
_WIDEST_PADDING = 0.1


@cache
def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """``count`` rising factors, each at least 2, of ``size`` or of a slightly larger padded size.

    Empty where even 10 % of padding finds none.
    """
    exact = most_balanced(size, count)
    candidates = range(size + 1, int(size * (1 + _WIDEST_PADDING)) + 1)
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
