"""In which order a linear layer's inputs are factorised, as plain data.

``""`` is the weight's own order, row after row of an image.  ``morton:28x28`` (``morton:3x32x32`` with
channels, which torch flattens first) is the coarse-grained order of Latorre (arXiv:quant-ph/0510031): each
site's input factor is h · w · c, its part of the height, of the width and of the channels, so that the first
site says which large block of the image a pixel is in and the last which pixel of a small block; 28 = 2·2·7
makes sites of 2·2, 2·2 and 7·7.  Any other order is the permutation itself: position p of the matrix that is
factorised holds input ``order[p]``.  A layer with an order permutes its inputs; its weight as loaded or
expanded is in its own order.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mpoc.errors import UsageError
from mpoc.factors import balanced_factors, choose_factors, default_sites

LEARNED = "learned"
MOST_INPUTS = 8192  # of an order that is learnt: the table of all exchanges is their square
MOST_ORDERED = 1 << 20  # inputs of an order by name: it is written out as a permutation
_MORTON = re.compile(r"morton:(?:([1-9]\d{0,6})x)?([1-9]\d{0,6})x([1-9]\d{0,6})")

Order = str | tuple[int, ...]


@dataclass(frozen=True)
class OrderRule:
    """``--order [PATTERN=]raster|morton:[CHANNELSx]HEIGHTxWIDTH|learned``."""

    pattern: str | None  # None: every linear layer that it fits
    order: str  # "" is raster


def parse_order(text: str) -> OrderRule:
    """The text of ``--order`` as plain data.

    Raises:
        UsageError: not of that form.
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
    """Whether a layer of so many inputs can have it."""
    return not order.startswith("morton") or math.prod(_image(order)) == inputs <= MOST_ORDERED


def ordered_factors(
    order: str, outputs: int, inputs: int, sites: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output factors, input factors) such that each site has a part of the height and of the width.

    Args:
        order: a Morton order of these inputs; of any other, factors are chosen without it.
        outputs: N_y.
        inputs: N_x.
        sites: the most there may be; None for the papers' habit.
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
        found = balanced_factors(outputs, count)
        if found:
            return found[::-1], tuple(parts)
    return (outputs,), (inputs,)


def permutation(order: Order, inputs: int, factors: tuple[int, ...]) -> tuple[int, ...] | None:
    """For each position of the factorised matrix the input there; None: its own.

    Args:
        order: as a structure has it.
        inputs: N_x.
        factors: I, one a site.

    Raises:
        ValueError: it is none of these inputs and factors.
    """
    if not order:
        return None
    if inputs > MOST_ORDERED:
        raise ValueError(f"an order of {inputs} inputs")
    found = _morton(order, factors) if isinstance(order, str) else order
    if len(found) != inputs or not _is_permutation(found):
        raise ValueError(f"an order of {len(found)} inputs for {inputs}")
    return found


@cache
def _is_permutation(numbers: tuple[int, ...]) -> bool:
    return sorted(numbers) == list(range(len(numbers)))


@cache
def _morton(order: str, factors: tuple[int, ...]) -> tuple[int, ...]:
    """Each site's digit is (h, w, c), c fastest; a position's digits of one axis make its place along it."""
    image = _image(order)
    if math.prod(image) != math.prod(factors):
        raise ValueError(f"{order} with input factors of {math.prod(factors)}")
    _, height, width = image
    sites = list(_parts(image, factors))
    found = []
    for digits in itertools.product(*(range(math.prod(parts)) for parts in sites)):
        h = w = c = 0
        for digit, (parts_c, parts_h, parts_w) in zip(digits, sites, strict=True):
            h = h * parts_h + digit // (parts_w * parts_c)
            w = w * parts_w + digit // parts_c % parts_w
            c = c * parts_c + digit % parts_c
        found.append((c * height + h) * width + w)
    return tuple(found)


def _parts(image: tuple[int, int, int], factors: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """For each site its part of channels, height and width: prime by prime to the side that has least there.

    Of those it goes to the one with more of that prime left for later sites; the height comes first.
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
    """(channels, height, width).

    Raises:
        ValueError: no Morton order.
    """
    found = _MORTON.fullmatch(order)
    if not found:
        raise ValueError(f"order {order!r}")
    return int(found[1] or 1), int(found[2]), int(found[3])


def _primes(size: int) -> list[int]:
    """Rising."""
    found, prime = [], 2
    while size > 1:
        if size % prime == 0:
            found.append(prime)
            size //= prime
        else:
            prime += 1
    return found
