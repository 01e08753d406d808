"""y = Ŵx through the cores, the cheapest way for this batch.

The chain is contracted from its last site to its first.  With the batch in front, x viewed as
(batch, I_1…I_{k-1}, I_k, D_k, J_{k+1}…J_n) and core k as a matrix (D_{k-1} J_k, I_k D_k), each step is one
matrix product and no axis ever moves:

    t[(batch I_1…I_{k-1}), (D_{k-1} J_k), (J_{k+1}…J_n)] = core_k @ t[…, (I_k D_k), (J_{k+1}…J_n)]

Neighbouring cores may be multiplied together first (for four sites of (8, 8): two of (64, 64)): more
parameters, but fewer and larger products, and a smaller intermediate.  All merged into one is the dense
weight itself.  A cost model (operations, bytes moved, products started) picks among all groupings; it is
plain data, chosen once for each batch size.

The trade-off: at large batches and bonds the intermediates outweigh what the cores save, and rebuilding the
dense weight wins, as it would for any tensor-train library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

Site = tuple[int, int, int, int]  # a core's shape (D_left, J, I, D_right)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and what starting a product costs: only their ratios matter."""

    flops: float
    bytes: float
    start: float  # seconds to start one product
    piece: float  # seconds for each matrix of a batched product


CPU = Rates(flops=1.5e11, bytes=1.2e10, start=6e-6, piece=2e-7)
GPU = Rates(flops=5e13, bytes=2e12, start=8e-6, piece=2e-9)


@dataclass(frozen=True)
class Grouping:
    """Which neighbouring sites are merged before x is contracted; one group: the dense weight."""

    cuts: tuple[int, ...]  # 0 = first, …, n: group g holds sites cuts[g]..cuts[g+1]-1
    seconds: float  # estimated


def contract(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Ŵx for every vector of a batch.

    Args:
        x: (batch, I_1·…·I_n).
        cores: (D_{k-1}, J_k, I_k, D_k), e.g. (4, 8, 16, 4).

    Returns:
        (batch, J_1·…·J_n).
    """
    cuts = _best_cuts(tuple([_site(core) for core in cores]), planned_batch(x), x.is_cuda)
    merged = [merge(cores[first:last]) for first, last in pairwise(cuts)]
    t, done = x, 1
    for core in reversed(merged):
        matrix = core.flatten(0, 1).flatten(1)  # (D_left J, I D_right)
        if done == 1:
            t = t.reshape(-1, matrix.shape[1]) @ matrix.T
        else:
            t = matrix @ t.reshape(-1, matrix.shape[1], done)
        done *= core.shape[1]
    return t.reshape(-1, done)


def merge(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores as one: (D_left, J…, I…, D_right)."""
    merged = cores[0]
    for core in cores[1:]:
        product = torch.einsum("ajib,blmc->ajlimc", merged, core)
        merged = product.flatten(3, 4).flatten(1, 2)
    return merged


def _site(core: Tensor) -> Site:
    a, j, i, b = core.shape
    return a, j, i, b


def planned_batch(x: Tensor) -> int:
    """The batch the plan is made for: rounded up to a power of two, so that few plans are made.

    While a graph is traced the batch may be a symbol; the plan must then not depend on it.
    """
    if torch.compiler.is_compiling():
        return 64
    return 1 << (x.shape[0] - 1).bit_length() if x.shape[0] > 1 else 1


def _best_cuts(sites: tuple[Site, ...], batch: int, on_gpu: bool) -> tuple[int, ...]:
    return best_grouping(sites, batch, GPU if on_gpu else CPU).cuts


# torch.compile then runs the planner instead of tracing it.  The public decorator,
# torch.compiler.assume_constant_result, does just this but imports the whole compiler (1.6 s) first.
_best_cuts._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def best_grouping(sites: tuple[Site, ...], batch: int, rates: Rates) -> Grouping:
    """The cheapest of all 2^(n-1) groupings of ``sites`` for ``batch`` vectors."""
    count = len(sites)
    found: list[Grouping] = []
    for pattern in range(1 << (count - 1)):
        inner = (k for k in range(1, count) if pattern >> (k - 1) & 1)
        cuts = (0, *inner, count)
        found.append(Grouping(cuts, _seconds(sites, cuts, batch, rates)))
    return min(found, key=lambda grouping: grouping.seconds)


def _seconds(sites: tuple[Site, ...], cuts: tuple[int, ...], batch: int, rates: Rates) -> float:
    """Estimated time of merging and contracting with these cuts."""
    total = 0.0
    groups: list[Site] = []
    for first, last in pairwise(cuts):
        group = sites[first]
        for site in sites[first + 1 : last]:
            rows, columns = math.prod(group[:3]), math.prod(site[1:])
            total += _product(1, rows, site[0], columns, rates) + rates.start
            total += 8 * rows * columns / rates.bytes * 2  # the axes of a merged core move
            group = (group[0], group[1] * site[1], group[2] * site[2], site[3])
        groups.append(group)
    pieces, done = batch * math.prod(group[2] for group in groups), 1
    for a, j, i, b in reversed(groups):
        pieces //= i
        if done == 1:
            total += _product(1, pieces, i * b, a * j, rates)
        else:
            total += _product(pieces, a * j, i * b, done, rates)
        done *= j
    return total


def _product(pieces: int, m: int, k: int, n: int, rates: Rates) -> float:
    """One (batched) product (m, k) @ (k, n): as long as the slower of arithmetic and memory."""
    arithmetic = 2 * pieces * m * k * n / (rates.flops * _efficiency(m, k, n))
    memory = 4 * pieces * (k * n + m * n) + 4 * m * k
    return rates.start + (pieces * rates.piece if pieces > 1 else 0.0) + max(arithmetic, memory / rates.bytes)


def _efficiency(m: int, k: int, n: int) -> float:
    """Share of the peak rate that a product with such sides reaches: narrow ones do not fill the units."""
    return min(1.0, (m / 32) ** 0.5, (k / 32) ** 0.5) * min(1.0, max(n, 2) / 16)
