"""A cost model of contractions, and the cheapest plan by it.

The time of a product is the longer of its arithmetic and its memory traffic, plus the time to start it. The
constants were fitted to measured times of all plans for 500 combinations of layer, bond and batch (the chosen
plans took 2 % longer than the fastest on average). Only their ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise

Site = tuple[int, int, int, int]  # a core's shape (D_left, J, I, D_right)


@dataclass(frozen=True)
class Rates:
    """Rates and overheads of a device."""

    flops: float  # per second, as are the next two
    bytes: float  # to and from memory
    cached: float  # bytes within the cache
    start: float  # seconds to start one operation
    call: float  # seconds that a call through cores takes beside its products
    piece: float  # seconds for each matrix of a batched product
    cache: int  # size of an intermediate that stays in the cache, in numbers
    block: int  # size of a block of rows of a rebuilt weight, in numbers


CPU = Rates(
    flops=2e11, bytes=1.8e10, cached=2e11, start=1e-5, call=1e-5, piece=3.5e-8, cache=1 << 20, block=1 << 21
)
GPU = Rates(
    flops=5e13, bytes=2e12, cached=2e12, start=8e-6, call=1e-5, piece=2e-9, cache=1 << 26, block=1 << 24
)


@dataclass(frozen=True)
class Plan:
    """How to contract: which neighbouring sites are merged first, and how much is computed at once."""

    cuts: tuple[int, ...]  # 0 = first, …, n: group g holds sites cuts[g]..cuts[g+1]-1
    rebuild: bool  # Ŵ is built from its one or two groups, ``rows`` outputs of the first at a time
    rows: int  # else: vectors of the batch at a time
    seconds: float  # estimated


@cache
def cheapest(sites: tuple[Site, ...], batch: int, on_gpu: bool, rank: int = 0) -> Plan:
    """The plan with the least estimated time for ``batch`` vectors.

    Args:
        sites: sites of the chain.
        batch: number of vectors.
        on_gpu: use the rates of a GPU, else those of a CPU.
        rank: rank of an added low-rank part; 0: none.
    """
    rates = GPU if on_gpu else CPU
    return min(ways(sites, batch, rates, rank), key=lambda plan: plan.seconds)


def ways(sites: tuple[Site, ...], batch: int, rates: Rates, rank: int = 0) -> Iterator[Plan]:
    """All plans: every grouping of neighbours, contracted as a chain, and every cut in two to rebuild Ŵ from.

    A low-rank part takes two more products beside a chain, and is added to a rebuilt weight.
    """
    count = len(sites)
    outputs, inputs = (math.prod(site[axis] for site in sites) for axis in (1, 2))
    apart = 0.0
    if rank:
        apart = product_seconds(1, batch, inputs, rank, rates) + product_seconds(
            1, batch, rank, outputs, rates
        )
    for size in range(count):
        for inner in combinations(range(1, count), size):
            cuts = (0, *inner, count)
            groups, merging = merged(sites, cuts, rates)
            largest = _largest_intermediate(groups)
            rows = max(1, min(batch, rates.cache // largest))
            yield Plan(cuts, False, rows, merging + _chain(groups, batch, rows, rates) + apart)
            if len(cuts) == 3:
                left, right = groups
                rows = max(1, min(left[1], rates.block // (right[1] * inputs)))
                yield Plan(cuts, True, rows, merging + _rebuild(left, right, batch, rows, rates, rank))
            elif rank and len(cuts) == 2:
                adding = product_seconds(1, outputs, rank, inputs, rates)
                yield Plan(
                    cuts, True, outputs, merging + adding + product_seconds(1, batch, inputs, outputs, rates)
                )


def merged(sites: tuple[Site, ...], cuts: tuple[int, ...], rates: Rates) -> tuple[list[Site], float]:
    """The sites after merging at ``cuts``, and the seconds that merging takes."""
    groups = [_merge(sites[first:last], rates) for first, last in pairwise(cuts)]
    return [site for site, _, _ in groups], sum(seconds for _, seconds, _ in groups)


@cache
def split_batch(sites: tuple[Site, ...]) -> int:
    """Where to divide neighbouring sites so that merging them takes least time."""
    return _merge(sites, CPU)[2]


@cache
def _merge(sites: tuple[Site, ...], rates: Rates) -> tuple[Site, float, int]:
    """The merged site, the seconds, and the best first division."""
    if len(sites) == 1:
        return sites[0], 0.0, 0
    options = []
    for cut in range(1, len(sites)):
        left, before, _ = _merge(sites[:cut], rates)
        right, after, _ = _merge(sites[cut:], rates)
        options.append((_joined(left, right), before + after + _join(left, right, rates), cut))
    return min(options, key=lambda option: option[1])


def _joined(left: Site, right: Site) -> Site:
    return left[0], left[1] * right[1], left[2] * right[2], right[3]


def _join(left: Site, right: Site, rates: Rates) -> float:
    """Seconds to merge two neighbours: the product, and moving its axes."""
    size = math.prod(_joined(left, right))
    product = product_seconds(1, math.prod(left[:3]), left[3], math.prod(right[1:]), rates)
    return product + rates.start + 8 * size / bandwidth(size, rates)


def _largest_intermediate(groups: list[Site]) -> int:
    """Size of the largest intermediate for one vector, in numbers."""
    before, done, largest = math.prod(group[2] for group in groups), 1, 1
    for a, j, i, _ in reversed(groups):
        before //= i
        done *= j
        largest = max(largest, before * a * done)
    return largest


def _chain(groups: list[Site], batch: int, rows: int, rates: Rates) -> float:
    """Seconds to contract ``batch`` vectors, ``rows`` of them at a time."""
    pieces, done, total = rows * math.prod(group[2] for group in groups), 1, 0.0
    for a, j, i, b in reversed(groups):
        pieces //= i
        total += (
            product_seconds(1, pieces, i * b, a * j, rates)
            if done == 1
            else product_seconds(pieces, a * j, i * b, done, rates)
        )
        done *= j
    return total * math.ceil(batch / rows)


def _rebuild(left: Site, right: Site, batch: int, rows: int, rates: Rates, rank: int) -> float:
    """Seconds to build Ŵ with ``rows`` outputs of the left group at a time, and to multiply by it."""
    block = (1, rows, *left[2:])
    seconds = _join(block, right, rates) + product_seconds(
        1, batch, left[2] * right[2], rows * right[1], rates
    )
    if rank:
        seconds += product_seconds(1, rows * right[1], rank, left[2] * right[2], rates)
    return seconds * math.ceil(left[1] / rows)


def product_seconds(pieces: int, m: int, k: int, n: int, rates: Rates) -> float:
    """Seconds for ``pieces`` products (m, k) @ (k, n) with one factor shared."""
    arithmetic = 2 * pieces * m * k * n / (rates.flops * _efficiency(m, k, n))
    numbers = pieces * (k * n + m * n) + m * k
    memory = 4 * numbers / bandwidth(numbers, rates)
    return rates.start + (pieces * rates.piece if pieces > 1 else 0.0) + max(arithmetic, memory)


def bandwidth(numbers: int, rates: Rates) -> float:
    """Bytes per second for reading and writing this many numbers."""
    return rates.cached if numbers <= 2 * rates.cache else rates.bytes


def _efficiency(m: int, k: int, n: int) -> float:
    """Share of the peak rate that a product with these sides reaches; narrow ones do not fill the units."""
    return min(1.0, (m / 200) ** 0.1) * min(1.0, (k / 32) ** 0.25) * min(1.0, (n / 16) ** 1.5)


@cache
def cheapest_gather(sites: tuple[Site, ...], count: int, on_gpu: bool) -> tuple[int, ...]:
    """The grouping of ``sites``, as ``Plan.cuts``, that takes least time for ``count`` rows of Ŵ."""
    inner, rates = range(1, len(sites)), GPU if on_gpu else CPU
    every = [(0, *c, len(sites)) for size in range(len(sites)) for c in combinations(inner, size)]
    return min(every, key=lambda cuts: _gather_seconds(sites, cuts, count, rates))


def _gather_seconds(sites: tuple[Site, ...], cuts: tuple[int, ...], count: int, rates: Rates) -> float:
    """Seconds for merging and, for each group, gathering slices (written and read) and multiplying."""
    groups, total = merged(sites, cuts, rates)
    total, before = 3 * total, 1  # merged cores are fresh memory; before: I so far
    for a, _, i, b in groups:
        flops, numbers = 2 * count * before * a * i * b, count * (3 * a * i * b + before * (a + i * b))
        total += 1.5 * rates.start + flops / (rates.flops / 4) + 4 * numbers / bandwidth(numbers, rates)
        before *= i
    return total


def dense_wins(
    sites: tuple[Site, ...], sides: tuple[int, int], batch: int, on_gpu: bool, rank: int = 0, made: int = 0
) -> bool:
    """Whether one product with a stored dense weight takes less time than the chain's cheapest plan.

    Args:
        sites: sites of the chain.
        sides: outputs and inputs of the dense weight, without padding.
        batch: number of vectors.
        on_gpu: use the rates of a GPU, else those of a CPU.
        rank: rank of an added low-rank part; 0: none.
        made: number of operations in which the chain is made first.
    """
    rates, (outputs, inputs) = GPU if on_gpu else CPU, sides
    dense = product_seconds(1, batch, inputs, outputs, rates)
    return dense < cheapest(sites, batch, on_gpu, rank).seconds + rates.call + made * rates.start
