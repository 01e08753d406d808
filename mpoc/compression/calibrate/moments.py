"""First and second moments of the rows that go into a layer, in one network or in two side by side.

Rows are gathered, and multiplied by one another as soon as there are more of them than features.  Where there
are not, the rows themselves are the smaller form of the moment, and exact.  Of very wide layers every second,
fourth, … row is looked at, so that memory is bounded.

Products of float32 rows are formed in float32, some thousand rows at a time, and summed in float64: twice as
fast as float64 throughout, and each entry is right to about 3e-7 of the standard deviations it belongs to.
Rows are shifted by the mean of the first ones, so that this holds where means are large beside deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    Sample,
)
from mpoc.runtime.device import release_freed_memory
from mpoc.tensor_networks.fit.second_moment import (
    CentredRows,
    MixedMoment,
    OutputMoment,
    ProductSum,
    RowMoment,
    Second,
    mirror,
)

_FIRST = 8192  # rows whose mean all are shifted by, of those that come first
_NARROW = 1024  # features up to which products are always formed
_AT_ONCE = 2048  # rows that are gathered for a product, once there are products
ROWS_FROM = 8192  # features from which on they never are
_KEPT = 1 << 24  # numbers of rows that are kept of a layer from there on


@dataclass(frozen=True)
class Moments:
    """Moments of the rows x̃ that go into one layer, and of the dense network's rows x; float64, on the CPU.

    Of a grouped convolution every tensor has a leading axis of groups.  Of an embedding rows are one-hot,
    their second moments diagonal: then ``second``, ``cross`` and ``dense_second`` hold the diagonal (N_x,)
    alone, the share of each index.  All three may be given as rows, about zero.
    """

    rows: int  # tokens that are no padding, or positions of a convolution, that there were
    mean: Tensor  # μ̃ (N_x,)
    second: Second  # E[x̃ x̃ᵀ] (N_x, N_x), not centred
    dense_mean: Tensor  # μ (N_x,); where only the dense network ran the same tensor as ``mean``
    cross: Second  # E[x x̃ᵀ] (N_x, N_x), not centred
    dense_second: Second  # E[x xᵀ] (N_x, N_x), not centred; (0,) where it was not wanted
    # W (N_y, N_x) float64 where of ``cross`` E[(W x) x̃ᵀ] alone matters: an OutputMoment, or rows
    weight: Tensor | None = None

    @classmethod
    def of_rows(
        cls,
        count: int,
        means: Sequence[Tensor],
        rows: Sequence[CentredRows],
        weights: Tensor,
        weight: Tensor | None = None,
    ) -> Moments:
        """Moments that are kept as rows: of one network, or of the compressed and the dense one."""
        seconds = [RowMoment(one, one, weights) for one in rows]
        cross = seconds[0] if len(rows) == 1 else RowMoment(rows[1], rows[0], weights)
        return cls(count, means[0], seconds[0], means[-1], cross, seconds[-1], weight)

    def on(self, device: torch.device) -> Moments:
        """The same on a device; what is one tensor stays one."""
        moved: dict[int, Any] = {}

        def move(one: Second) -> Any:
            return moved.setdefault(id(one), one.to(device))

        weight = None if self.weight is None else move(self.weight)

        if isinstance(self.second, RowMoment):
            networks = _networks(self)
            rows = [CentredRows(move(one.values), move(one.centre)) for _, one in networks]
            return Moments.of_rows(
                self.rows, [move(mean) for mean, _ in networks], rows, move(self.second.weights), weight
            )
        return Moments(self.rows, **{name: move(getattr(self, name)) for name in _MOMENTS}, weight=weight)


_MOMENTS = "mean", "second", "dense_mean", "cross", "dense_second"


def with_seconds(moments: Mapping[str, Moments], keep: Callable[[Tensor], Tensor]) -> dict[str, Moments]:
    """The same with matrices E[x̃ x̃ᵀ] of their own as ``keep`` returns them, once where layers share one."""
    changed = {id(one): one for one in moments.values()}
    for key, one in changed.items():
        if isinstance(one.second, Tensor) and one.cross is not one.second:
            changed[key] = replace(one, second=keep(one.second))
    return {name: changed[id(one)] for name, one in moments.items()}


def merge(one: Moments, other: Moments, *, dense_second: bool = True, formed: bool = True) -> Moments:
    """The moments of the rows of both together; tensors that are one and the same in both stay so.

    Args:
        one: of some rows.
        other: of others.
        dense_second: whether E[x xᵀ] is wanted where rows become matrices.
        formed: whether that of a matrix and of rows is to be a matrix.
    """
    rows = one.rows + other.rows
    return replace(_mixed(one, other, other.rows / rows, dense_second, formed), rows=rows)


def shrunk(own: Moments, prior: Moments) -> Moments:
    """Moments of few rows, moved towards those of all siblings (``prior``), which count as N_x more rows."""
    weight = own.mean.shape[-1] / (own.mean.shape[-1] + own.rows)
    return _mixed(own, prior, weight)


def _mixed(
    one: Moments, other: Moments, weight: float, dense_second: bool = True, formed: bool = True
) -> Moments:
    """The share ``weight`` of another's moments, and the rest of one's; as rows where they stay few."""
    if isinstance(one.second, RowMoment) and isinstance(other.second, RowMoment):
        joined = _joined(one, other, weight)
        width, count = joined.mean.shape[-1], len(joined.second.weights)
        return joined if count <= width or width >= ROWS_FROM else _formed(joined, dense_second)
    one = _formed(one, dense_second)
    mixed: dict[tuple[int, int], Second] = {}

    def both(a: Second, b: Second) -> Second:
        if (id(a), id(b)) not in mixed:
            mixed[id(a), id(b)] = _between(a, b, weight, formed)
        return mixed[id(a), id(b)]

    mixture = {name: both(getattr(one, name), getattr(other, name)) for name in _MOMENTS}
    return Moments(one.rows, **mixture, weight=other.weight if one.weight is None else one.weight)


def _between(a: Second, b: Second, weight: float, formed: bool) -> Second:
    """(1 − weight) a + weight b; nothing where one of them was not wanted."""
    if isinstance(a, OutputMoment):
        return replace(a, matrix=torch.lerp(a.matrix, a.weight @ b, weight))
    if isinstance(b, OutputMoment):
        return replace(b, matrix=torch.lerp(b.weight @ a, b.matrix, weight))
    if not (a.numel() and (isinstance(b, RowMoment) or b.numel())):
        return a.new_empty(0)  # rows have E[xxᵀ] where products do without
    if isinstance(b, RowMoment):
        return MixedMoment(a, b, weight).formed() if formed else MixedMoment(a, b, weight)
    return torch.lerp(a, b, weight)


def _joined(one: Moments, other: Moments, weight: float) -> Moments:
    """Rows of both, of very wide layers a part of them."""
    sides = _networks(one), _networks(other)
    both = max(map(len, sides))
    pairs = zip(*(side * (both // len(side)) for side in sides), strict=True)
    weights = torch.cat([(1 - weight) * one.second.weights, weight * other.second.weights])
    kept = weights[:: (step := _step(len(weights), one.mean.shape[-1]))]
    first = -len(one.second.weights) % step  # of the other's rows that is kept
    means, rows = [], []
    for (mean, a), (other_mean, b) in pairs:
        moved = b.values[first::step] + (a.centre - b.centre).to(b.values.dtype)
        rows.append(CentredRows(torch.cat([a.values[::step], moved]), a.centre))
        means.append(torch.lerp(mean, other_mean, weight))
    return Moments.of_rows(one.rows, means, rows, kept * (weights.sum() / kept.sum()), one.weight)


def _step(count: int, width: int, parts: int = 1) -> int:
    """Every how many of so many rows are kept."""
    return 1 if width < ROWS_FROM else 2 ** max(0, math.ceil(math.log2(count * parts * width / _KEPT)))


def _networks(moments: Moments) -> list[tuple[Tensor, CentredRows]]:
    """Mean and rows of the compressed and the dense network, or of the only one."""
    compressed = moments.mean, moments.second.left
    if moments.dense_second is moments.second:
        return [compressed]
    return [compressed, (moments.dense_mean, moments.dense_second.left)]


def _formed(moments: Moments, dense_second: bool) -> Moments:
    """Second moments as matrices, that of the dense network's rows only if it is wanted."""
    second, cross, dense = moments.second, moments.cross, moments.dense_second
    if isinstance(second, Tensor):
        return moments
    formed = second.formed()
    if dense is second:
        return replace(moments, second=formed, cross=formed, dense_second=formed)
    dense = dense.formed() if dense_second else formed.new_empty(0)
    weight = moments.weight
    cross = cross.formed() if weight is None else OutputMoment(weight, weight @ cross)
    return replace(moments, second=formed, cross=cross, dense_second=dense)


class _Sums:
    """Sums of one network's rows, shifted."""

    def __init__(self, rows: Tensor) -> None:
        first = rows[..., :_FIRST, :].mean(-2, keepdim=True, dtype=torch.float64)
        self.shift = first.to(rows.dtype)  # (…, 1, N_x)
        self.total = torch.zeros_like(first)

    def shifted(self, rows: Tensor) -> Tensor:
        """The rows less the shift, added to the total."""
        rows = rows - self.shift
        self.total += rows.sum(-2, keepdim=True, dtype=torch.float64)
        return rows

    def mean(self, count: int) -> Tensor:
        """The mean (…, N_x) of ``count`` rows."""
        return (self.shift + self.total / count).squeeze(-2)


class Accumulator:
    """Sums over rows as they come, of bounded memory: up to three tensors (N_x, N_x) in float64.

    With a weight the one of E[x x̃ᵀ] gives way to E[(W x) x̃ᵀ] (N_y, N_x).

    Args:
        dense_second: whether E[x xᵀ] is wanted too, where rows of the dense network are given.
        keeps_rows: whether the moments of wide layers may be given as rows.
        parts: number of accumulators whose moments are merged, and share what may be kept.
        weight: W (N_y, N_x) float64, if E[(W x) x̃ᵀ] is to be known alone.
    """

    def __init__(
        self,
        dense_second: bool = True,
        keeps_rows: bool = False,
        parts: int = 1,
        weight: Tensor | None = None,
    ) -> None:
        self.count = self._summed = 0  # rows that were given, and those of them that were looked at
        self._wants_dense, self._keeps_rows, self._parts = dense_second, keeps_rows, parts
        self._weight = weight
        self._sums: list[_Sums] = []  # of the rows, then of the dense ones
        self._products: list[ProductSum] = []  # x̃x̃ᵀ, xx̃ᵀ, xxᵀ of shifted rows
        self._blocks: list[list[Tensor]] = []  # shifted rows that are not in the products yet
        self._held, self._step = 0, 1  # rows in the blocks; of very wide layers, every how many are kept

    def add(self, rows: Tensor, dense: Tensor | None = None) -> None:
        """Add rows x̃, and the matching rows x of the dense network, always or never.

        Args:
            rows: (n, N_x), or (groups, n, N_x); float64 rows are worked with in float64, others in float32.
            dense: of the same shape.
        """
        given = [rows] if dense is None else [rows, dense]
        count, width = rows.shape[-2:]
        if count == 0:
            return
        if self._step > 1:
            given = [one[-self.count % self._step :: self._step] for one in given]
        self.count += count
        given = [r if r.dtype == torch.float64 else r.float() for r in given]
        if not self._sums:
            self._sums = [_Sums(r) for r in given]
        block = [sums.shifted(r) for sums, r in zip(self._sums, given, strict=True)]
        self._blocks.append(block)
        self._held += block[0].shape[-2]
        self._summed += block[0].shape[-2]
        if self._keeps_rows and width >= ROWS_FROM:
            self._thin(_step(self._held, width, self._parts))
        elif self._held > (_AT_ONCE if self._products else max(_NARROW, width)):
            self._multiply()

    def _joined(self) -> list[Tensor]:
        """The rows of all blocks, of each network; they are one block from then on."""
        if len(self._blocks) > 1:
            networks = range(len(self._blocks[0]))
            self._blocks = [[torch.cat([block.pop(0) for block in self._blocks], -2) for _ in networks]]
        return self._blocks[0]

    def _thin(self, step: int) -> None:
        if step == 1:
            return
        first, self._held, self._step = 0, 0, self._step * step
        for block in self._blocks:
            count = len(block[0])
            block[:] = [one[first::step].clone() for one in block]
            first, self._held = (first - count) % step, self._held + len(block[0])
        release_freed_memory()

    def _multiply(self) -> None:
        """Add the products of the blocks, and forget these."""
        rows, self._blocks, self._held = self._joined(), [], 0
        pairs = [(rows[0], rows[0])]
        if len(rows) > 1:
            pairs += [(self._outputs(rows[1]), rows[0])]
            pairs += [(rows[1], rows[1])] if self._wants_dense else []
        self._products = self._products or [ProductSum() for _ in pairs]
        for total, (a, b) in zip(self._products, pairs, strict=True):
            total.add(a, b)
        if rows[0].shape[-1] > 2 * _NARROW:  # beside such products it takes no time
            release_freed_memory()

    def _outputs(self, values: Tensor) -> Tensor:
        """Values (…, N_x), or W times them (…, N_y) where outputs are wanted."""
        return values if self._weight is None else values @ self._weight.to(values.dtype).mT

    def moments(self, rows: int | None = None) -> Moments:
        """The moments of all rows added.

        Args:
            rows: number of rows of which those added are a sample.

        Raises:
            ValueError: no rows were added.
        """
        if not self.count:
            raise ValueError("no rows were added")
        means = [sums.mean(self._summed) for sums in self._sums]
        weight = None if self._weight is None else self._weight.cpu()
        if self._keeps_rows and not self._products and means[0].shape[-1] > _NARROW:
            kept = [
                CentredRows(one.cpu(), -sums.shift[0].double().cpu())
                for one, sums in zip(self._joined(), self._sums, strict=True)
            ]
            weights = torch.full((self._held,), 1 / self._held, dtype=torch.float64)
            means = [mean.cpu() for mean in means]
            return Moments.of_rows(rows or self.count, means, kept, weights, weight)
        if self._blocks:
            self._multiply()
        shifts = [sums.shift for sums in self._sums]
        compressed = shifts[0], means[0]
        second = self._second(0, compressed, compressed)
        if len(means) == 1:
            mean = means[0].cpu()
            return Moments(rows or self.count, mean, second, mean, second, second)
        dense = shifts[1], means[1]
        outputs = self._outputs(shifts[1].double()), self._outputs(means[1])
        cross: Second = self._second(1, outputs, compressed)
        if weight is not None:
            cross = OutputMoment(weight, cross)
        dense_second = self._second(2, dense, dense) if self._wants_dense else torch.empty(0).double()
        means = [mean.cpu() for mean in means]
        return Moments(rows or self.count, means[0], second, means[1], cross, dense_second, weight)

    def _second(self, which: int, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        """E[a bᵀ] from the product of the shifted a − s and b − t: Σ/n + s E[b]ᵀ + (E[a] − s) tᵀ.

        Args:
            which: of the products.
            left: s and E[a].
            right: t and E[b].
        """
        (s, mean), (t, other) = left, right
        s = s.mT.double()
        second = self._products[which].total() / self._summed
        columns = torch.cat([s, mean[..., None] - s], -1)  # (…, N, 2)
        rows = torch.cat([other[..., None, :], t.double()], -2)
        second.view(-1, *second.shape[-2:]).baddbmm_(
            columns.view(-1, *columns.shape[-2:]), rows.view(-1, *rows.shape[-2:])
        )
        if left is right:
            mirror(second)
        return second.cpu()


def one_hot_moments(counts: Tensor) -> Moments:
    """The moments of an embedding's one-hot rows, from how often each index occurred.

    Args:
        counts: (N,) whole numbers, at least one of them above 0.
    """
    rows = int(counts.sum())
    share = counts.double().cpu() / rows
    return Moments(rows, share, share, share, share, share)


class LayerSums:
    """Accumulates the inputs of one layer over a pass.

    Args:
        layer: whose inputs.
        dense_second: as :class:`Accumulator` takes it.
        parts: likewise.
        weight: likewise.
    """

    def __init__(
        self, layer: ObservedLayer, dense_second: bool = True, parts: int = 1, weight: Tensor | None = None
    ) -> None:
        self._layer = layer
        self._accumulator = Accumulator(dense_second, layer.inputs.have_one_moment, parts, weight)
        self._counts: Tensor | int = 0
        self.rows = 0

    def add(
        self, given: Tensor, mask: Tensor | None, sample: Sample | None, dense: Tensor | None = None
    ) -> None:
        """Add what the layer was given in one call, and what of the same shape the dense network gave it."""
        inputs = self._layer.inputs
        if isinstance(inputs, EmbeddingInputs):
            self._counts = self._counts + inputs.counts(given, mask)
            return
        added = self._accumulator.count
        if dense is None:
            for block in inputs.blocks(given, mask, sample):
                self._accumulator.add(block)
        else:
            blocks = inputs.blocks(given, mask, sample), inputs.blocks(dense, mask, sample)
            for block, other in zip(*blocks, strict=True):
                self._accumulator.add(block, other)
        part = sample is not None and isinstance(inputs, ConvInputs)
        self.rows += inputs.count(given, mask) if part else self._accumulator.count - added

    def moments(self) -> Moments | None:
        """The moments of all inputs added; None: they had no rows."""
        if isinstance(self._counts, Tensor) and bool(self._counts.any()):
            return one_hot_moments(self._counts)
        return self._accumulator.moments(self.rows) if self.rows else None
