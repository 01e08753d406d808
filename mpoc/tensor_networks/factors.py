"""Factors of a layer's outputs and inputs, and the order in which its inputs are factorised.

A side is a product of nearly equal factors, one per site. If it has none (a prime, a vocabulary of 30522), a
slightly larger, padded side is factorised.

The order of a linear layer's inputs is plain data. ``""`` is the weight's own order, row after row of an
image. ``morton:28x28`` (``morton:3x32x32`` with channels, which torch flattens first) is the coarse-grained
order of Latorre (arXiv:quant-ph/0510031): the input factor of a site is h · w · c, its parts of the height,
the width and the channels. The first site then selects a large block of the image and the last a pixel in a
small block; 28 = 2·2·7 makes sites of 2·2, 2·2 and 7·7. Any other order is the permutation itself: column p
of the factorised matrix is input ``order[p]``. A layer with an order permutes its inputs, and its weight as
loaded or expanded is in its own order.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mpoc.errors import UsageError
from mpoc.tensor_networks.geometry import Geometry

# Exact factors are kept unless their cost is more than this many times that of padded ones.
_EXACT_BONUS = 2.0
_WIDEST_PADDING = 0.1
_MOST_TRIED = 1 << 15

LEARNED = "learned"
MOST_INPUTS = 8192  # limit for a learned order: the table of all exchanges is quadratic
MOST_ORDERED = 1 << 20  # limit for a named order, which is expanded to a permutation
_MORTON = re.compile(r"morton:(?:([1-9]\d{0,6})x)?([1-9]\d{0,6})x([1-9]\d{0,6})")


@cache
def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """``count`` ascending factors ≥ 2 of ``size``, or of up to 10 % more; () if there are none."""
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
    """The ``count`` ascending factors ≥ 2 (≤ ``limit``) with the smallest sum; () if there are none."""
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
    """Output and input factors of two sites, (2, N_y/2) and (N_x/2, 2); None if a side is prime.

    At equal size, such MPOs come closest to a layer's outputs.
    """
    j, i = _least_factor(outputs), _least_factor(inputs)
    return None if j == outputs or i == inputs else ((j, outputs // j), (inputs // i, i))


def _least_factor(size: int) -> int:
    return next((k for k in range(2, math.isqrt(size) + 1) if size % k == 0), size)


def default_sites(outputs: int, inputs: int) -> int:
    """The papers' number of sites: four if the larger side is below 1,024, else five."""
    wanted = 4 if max(outputs, inputs) < 1024 else 5
    return max(1, min(wanted, int(math.log2(max(2, min(outputs, inputs))))))


def mera_sites(outputs: int, inputs: int) -> int:
    """Number of sites with factors of about 4 on the larger side: a MERA gains by levels of small sites."""
    wanted = (max(1, outputs - 1, inputs - 1).bit_length() + 1) // 2
    return max(1, min(wanted, int(math.log2(max(2, min(outputs, inputs))))))


def choose_factors(outputs: int, inputs: int, sites: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output factors, input factors): outputs descending, inputs ascending, so that sites are of equal size.

    Args:
        outputs: N_y.
        inputs: N_x.
        sites: number of sites; None: the papers' number. There are fewer if a side is too small, or prime.
    """
    most = int(math.log2(1.1 * max(2, min(outputs, inputs)))) + 1  # a factor of 2 at least to each
    wanted = min(sites, most) if sites is not None else default_sites(outputs, inputs)
    for count in range(wanted, 1, -1):
        output_factors, input_factors = balanced_factors(outputs, count), balanced_factors(inputs, count)
        if output_factors and input_factors:
            return output_factors[::-1], input_factors
    return (outputs,), (inputs,)


def choose_map_factors(
    geometry: Geometry, channels: tuple[int, int], sites: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output factors, input factors) of a whole map: each axis has its own sites, the channels come last.

    Neighbouring sites are merged if there are too many. Nothing is padded. If ``sites`` is None, a large map
    has more sites than the papers' number: factors of at most about 8 in height and width, and three sites
    for the channels.
    """
    positions = geometry.positions
    outputs, inputs = (count * width for count, width in zip(positions, channels, strict=True))
    pairs: list[tuple[int, int]] = []
    for pair in zip(geometry.output_size, geometry.size, strict=True):
        if max(pair) > 1:
            pairs += _exact_pairs(*pair, math.ceil(math.log2(max(pair)) / 3))
    habit = default_sites(outputs, inputs) if sites is None else sites
    least = min(3, default_sites(*channels)) if sites is None else 1
    of_channels = _exact_pairs(*channels, max(least, habit - len(pairs)))
    # Shifts keep most digits of a position, so positions match digit by digit; channels balance the sites.
    pairs += zip((j for j, _ in reversed(of_channels)), (i for _, i in of_channels), strict=True)
    while sites is not None and len(pairs) > sites:
        k = min(range(len(pairs) - 1), key=lambda k: math.prod(pairs[k] + pairs[k + 1]))
        (j, i), (more_j, more_i) = pairs[k : k + 2]
        pairs[k : k + 2] = [(j * more_j, i * more_i)]
    return tuple(j for j, _ in pairs), tuple(i for _, i in pairs)


def _exact_pairs(outputs: int, inputs: int, count: int) -> list[tuple[int, int]]:
    """Ascending factors (J, I) of at most ``count`` sites that multiply out to the two sides exactly."""
    for number in range(count, 1, -1):
        pairs = list(zip(most_balanced(outputs, number), most_balanced(inputs, number), strict=False))
        if pairs:
            return pairs
    return [(outputs, inputs)]


InputOrder = str | tuple[int, ...]


@dataclass(frozen=True)
class OrderRule:
    """``--order [PATTERN=]raster|morton:[CHANNELSx]HEIGHTxWIDTH|learned``."""

    pattern: str | None  # None: every linear layer that it fits
    order: str  # "" is raster


def parse_order(text: str) -> OrderRule:
    """Parse the text of ``--order``.

    Raises:
        UsageError: the text is not an order.
    """
    pattern, equals, order = text.rpartition("=")
    order = order.strip()
    if not (order in ("raster", LEARNED) or _MORTON.fullmatch(order)) or (equals and not pattern):
        raise UsageError(
            f"{text!r} is not an order: raster, learned, or morton with the image's size",
            "--order 'fc1=morton:28x28', or morton:3x32x32 with channels",
        )
    return OrderRule(pattern or None, "" if order == "raster" else order)


def order_fits(order: str, inputs: int) -> bool:
    """Whether a layer with this number of inputs can have the order."""
    return not order.startswith("morton") or math.prod(_image(order)) == inputs <= MOST_ORDERED


def ordered_factors(
    order: str, outputs: int, inputs: int, sites: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output factors, input factors); for a Morton order, each site has a part of the height and the width.

    Args:
        order: order of the inputs.
        outputs: N_y.
        inputs: N_x.
        sites: largest number of sites; None: the papers' number.
    """
    if not order.startswith("morton"):
        return choose_factors(outputs, inputs, sites)
    *channels, height, width = _image(order)
    parts = [h * w for h, w in itertools.zip_longest(_primes(height), _primes(width), fillvalue=1)] or [1]
    parts[-1] *= math.prod(channels)
    wanted = default_sites(outputs, inputs) if sites is None else sites
    for count in range(min(wanted, len(parts)), 1, -1):
        while len(parts) > count:
            k = min(range(len(parts) - 1), key=lambda k: parts[k] * parts[k + 1])
            parts[k : k + 2] = [parts[k] * parts[k + 1]]
        output_factors = balanced_factors(outputs, count)
        if output_factors:
            return output_factors[::-1], tuple(parts)
    return (outputs,), (inputs,)


def permutation(order: InputOrder, inputs: int, factors: tuple[int, ...]) -> tuple[int, ...] | None:
    """The input at each column of the factorised matrix; None: the inputs keep their own order.

    Args:
        order: the order in a structure.
        inputs: N_x.
        factors: I, one per site.

    Raises:
        ValueError: the order does not fit these inputs and factors.
    """
    if not order:
        return None
    if inputs > MOST_ORDERED:
        raise ValueError(f"an order of {inputs} inputs")
    numbers = _morton(order, factors) if isinstance(order, str) else order
    if len(numbers) != inputs or not _is_permutation(numbers):
        raise ValueError(f"an order of {len(numbers)} inputs for {inputs}")
    return numbers


@cache
def _is_permutation(numbers: tuple[int, ...]) -> bool:
    return sorted(numbers) == list(range(len(numbers)))


@cache
def _morton(order: str, factors: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation of a Morton order. Each site's digit is (h, w, c) with c fastest."""
    image = _image(order)
    if math.prod(image) != math.prod(factors):
        raise ValueError(f"{order} with input factors of {math.prod(factors)}")
    _, height, width = image
    sites = list(_parts(image, factors))
    numbers = []
    for digits in itertools.product(*(range(math.prod(parts)) for parts in sites)):
        h = w = c = 0
        for digit, (parts_c, parts_h, parts_w) in zip(digits, sites, strict=True):
            h = h * parts_h + digit // (parts_w * parts_c)
            w = w * parts_w + digit // parts_c % parts_w
            c = c * parts_c + digit % parts_c
        numbers.append((c * height + h) * width + w)
    return tuple(numbers)


def _parts(image: tuple[int, int, int], factors: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The parts of channels, height and width at each site.

    Each prime of the site's factor goes to the axis with the smallest part there; among equals, to the one
    with more of that prime left for later sites; then to the height.
    """
    left = [_primes(side) for side in image]
    for factor in factors:
        parts = [1, 1, 1]
        for prime in reversed(_primes(factor)):
            able = [axis for axis in (1, 2, 0) if prime in left[axis]]
            axis = min(able, key=lambda axis: (parts[axis], -left[axis].count(prime)))
            left[axis].remove(prime)
            parts[axis] *= prime
        yield tuple(parts)


def _image(order: str) -> tuple[int, int, int]:
    """(channels, height, width) of a Morton order.

    Raises:
        ValueError: this is not a Morton order.
    """
    match = _MORTON.fullmatch(order)
    if not match:
        raise ValueError(f"order {order!r}")
    return int(match[1] or 1), int(match[2]), int(match[3])


def _primes(size: int) -> list[int]:
    """The prime factors, ascending."""
    primes, prime = [], 2
    while size > 1:
        if size % prime == 0:
            primes.append(prime)
            size //= prime
        else:
            prime += 1
    return primes
