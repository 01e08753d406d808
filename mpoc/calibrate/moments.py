"""First and second moments of the rows that go into a layer, of one network or of two side by side.

Products of float32 rows are formed in float32, ``_BLOCK`` rows at a time, and summed in float64: twice as
fast as float64 throughout, and each entry is right to about 3e-7 of the standard deviations it belongs to.
Rows are shifted by the mean of the first ones, so that it holds where means are large beside deviations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_BLOCK = 8192  # rows of one product


@dataclass(frozen=True)
class Moments:
    """Moments of the rows x̃ that go into one layer, and of the dense network's rows x; float64, on the CPU.

    Of a grouped convolution every tensor has a leading axis of groups.  Of an embedding rows are one-hot,
    their second moments diagonal: then ``second``, ``cross`` and ``dense_second`` hold the diagonal (N_x,)
    alone, the share of each index.
    """

    rows: int  # tokens that are no padding, or positions of a convolution, that there were
    mean: Tensor  # μ̃ (N_x,)
    second: Tensor  # E[x̃ x̃ᵀ] (N_x, N_x), not centred
    dense_mean: Tensor  # μ (N_x,); where only the dense network ran the same tensor as ``mean``
    cross: Tensor  # E[x x̃ᵀ] (N_x, N_x), not centred
    dense_second: Tensor  # E[x xᵀ] (N_x, N_x), not centred; (0,) where it was not wanted


def merge(one: Moments, other: Moments) -> Moments:
    """The moments of the rows of both together; what is one tensor in both stays one tensor."""
    rows = one.rows + other.rows
    merged: dict[tuple[int, int], Tensor] = {}

    def both(a: Tensor, b: Tensor) -> Tensor:
        if (id(a), id(b)) not in merged:
            merged[id(a), id(b)] = torch.lerp(a, b, other.rows / rows)
        return merged[id(a), id(b)]

    names = [field.name for field in fields(one) if field.name != "rows"]
    return Moments(rows, **{name: both(getattr(one, name), getattr(other, name)) for name in names})


def product(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of left rightᵀ: (…, n, A), (…, n, B) → (…, A, B) float64."""
    if left.dtype == torch.float64:
        return left.mT @ right
    total = left.new_zeros(*left.shape[:-2], left.shape[-1], right.shape[-1], dtype=torch.float64)
    pairs = zip(left.float().split(_BLOCK, -2), right.float().split(_BLOCK, -2), strict=True)
    for a, b in pairs:
        total += a.mT @ b
    return total


class _Sums:
    """Of shifted rows, one network's."""

    def __init__(self, rows: Tensor) -> None:
        first = rows[..., :_BLOCK, :].mean(-2, keepdim=True, dtype=torch.float64)
        self.shift = first.to(rows.dtype)  # (…, 1, N_x)
        self.total = torch.zeros_like(first)

    def shifted(self, rows: Tensor) -> Tensor:
        """The rows less the shift; they are counted."""
        rows = rows - self.shift
        self.total += rows.sum(-2, keepdim=True, dtype=torch.float64)
        return rows

    def mean(self, count: int) -> Tensor:
        """(…, N_x)."""
        return (self.shift + self.total / count).squeeze(-2)


class Accumulator:
    """Sums over rows as they come, of bounded memory: up to three tensors (N_x, N_x) in float64.

    Args:
        dense_second: whether E[x xᵀ] is wanted too, where rows of the dense network are given.
    """

    def __init__(self, dense_second: bool = True) -> None:
        self.count = 0
        self._wants_dense = dense_second
        self._sums: list[_Sums] = []  # of the rows, then of the dense ones
        self._products: list[Tensor] = []  # x̃x̃ᵀ, xx̃ᵀ, xxᵀ of shifted rows

    def add(self, rows: Tensor, dense: Tensor | None = None) -> None:
        """Add rows x̃, and the matching rows x of the dense network, always or never.

        Args:
            rows: (n, N_x), or (groups, n, N_x); float64 rows are worked with in float64, others in float32.
            dense: of the same shape.
        """
        given = [rows] if dense is None else [rows, dense]
        if rows.shape[-2] == 0:
            return
        given = [r if r.dtype == torch.float64 else r.float() for r in given]
        if not self._sums:
            self._sums = [_Sums(r) for r in given]
        shifted = [sums.shifted(r) for sums, r in zip(self._sums, given, strict=True)]
        pairs = [(shifted[0], shifted[0])]
        if dense is not None:
            pairs += [(shifted[1], shifted[0])]
            pairs += [(shifted[1], shifted[1])] if self._wants_dense else []
        found = [product(a, b) for a, b in pairs]
        if not self._products:
            self._products = found
        else:
            for total, part in zip(self._products, found, strict=True):
                total += part
        self.count += rows.shape[-2]

    def moments(self, rows: int | None = None) -> Moments:
        """What was gathered.

        Args:
            rows: there were, where those added are a part of them.

        Raises:
            ValueError: no rows were added.
        """
        if not self.count:
            raise ValueError("no rows were added")
        means = [sums.mean(self.count) for sums in self._sums]
        second = self._second(0, 0, 0, means)
        if len(means) == 1:
            mean = means[0].cpu()
            return Moments(rows or self.count, mean, second, mean, second, second)
        cross = self._second(1, 1, 0, means)
        dense_second = self._second(2, 1, 1, means) if self._wants_dense else torch.empty(0).double()
        return Moments(rows or self.count, means[0].cpu(), second, means[1].cpu(), cross, dense_second)

    def _second(self, which: int, left: int, right: int, means: list[Tensor]) -> Tensor:
        """E[a bᵀ] from the product of the shifted a − s and b − t: Σ/n + s E[b]ᵀ + (E[a] − s) tᵀ."""
        s, t = self._sums[left].shift.squeeze(-2).double(), self._sums[right].shift.squeeze(-2).double()
        found = self._products[which] / self.count
        found.addcmul_(s[..., :, None], means[right][..., None, :])
        found.addcmul_((means[left] - s)[..., :, None], t[..., None, :])
        if left == right:
            found = (found + found.mT) / 2
        return found.cpu()


def one_hot_moments(counts: Tensor) -> Moments:
    """Of an embedding's one-hot rows, from how often each index came.

    Args:
        counts: (N,) whole numbers, at least one of them above 0.
    """
    rows = int(counts.sum())
    share = counts.double().cpu() / rows
    return Moments(rows, share, share, share, share, share)
