"""First and second moments of the rows that go into a layer, in one network or in two side by side.

Products of float32 rows are formed in float32, ``_BLOCK`` rows at a time, and summed in float64: twice as
fast as float64 throughout, and each entry is right to about 3e-7 of the standard deviations it belongs to.
Rows are shifted by the mean of the first ones, so that this holds where means are large beside deviations.

A pass is cut into shards of batches.  Each shard is summed by itself, and the sums are merged in order,
whichever process makes them.  Several processes thus find what one alone finds, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from mpoc.compression.calibrate.layer_inputs import ConvInputs, EmbeddingInputs, ObservedLayer, Sample
from mpoc.io.keyed_store import Scratch
from mpoc.runtime.device import derived_seed
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

_MOST = 8  # parts: more processes than that cannot share a pass

_Key = TypeVar("_Key", bound=Hashable)
_Sum = TypeVar("_Sum")

_BLOCK = 8192  # rows of one product


@dataclass(frozen=True)
class BatchShards:
    """The shards of ``count`` batches, and the processes that share them."""

    count: int
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def every(self) -> list[range]:
        """The batches of each shard; the shards do not depend on the number of processes."""
        parts = max(1, min(_MOST, self.count))
        return [range(*ends) for ends in pairwise(k * self.count // parts for k in range(parts + 1))]

    @property
    def mine(self) -> list[int]:
        """The batches that this process runs."""
        return [index for part in self.every[self.group.rank :: self.group.size] for index in part]

    def total(
        self, measure: Callable[[range], dict[_Key, _Sum]], merge: Callable[[_Sum, _Sum], _Sum]
    ) -> dict[_Key, _Sum]:
        """Accumulate sums over all batches, the same in all processes.

        Args:
            measure: gives the sums over the batches of one shard, on the CPU.
            merge: joins a sum over earlier batches and one over later ones.
        """
        total: dict[_Key, _Sum] = {}
        for first in range(0, len(self.every), self.group.size):
            parts = self.every[first : first + self.group.size]
            own: dict[_Key, _Sum] = {}
            with self.group.all_or_raise():
                if self.group.rank < len(parts):
                    own = measure(parts[self.group.rank])
            for owner in range(len(parts)):
                for key in self.group.broadcast(list(own), src=owner):
                    given = self.group.broadcast(
                        own.pop(key) if owner == self.group.rank else None, src=owner
                    )
                    total[key] = merge(total[key], given) if key in total else given
        return total


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
    """The moments of the rows of both together; tensors that are one and the same in both stay so."""
    rows = one.rows + other.rows
    merged: dict[tuple[int, int], Tensor] = {}

    def both(a: Tensor, b: Tensor) -> Tensor:
        if (id(a), id(b)) not in merged:
            merged[id(a), id(b)] = torch.lerp(a, b, other.rows / rows)
        return merged[id(a), id(b)]

    names = [field.name for field in fields(one) if field.name != "rows"]
    return Moments(rows, **{name: both(getattr(one, name), getattr(other, name)) for name in names})


def shrunk(own: Moments, prior: Moments) -> Moments:
    """Moments of few rows, moved towards those of all siblings, which count as N_x more rows.

    Args:
        own: of the layer.
        prior: of all layers that may be given such rows.
    """
    weight = own.mean.shape[-1] / (own.mean.shape[-1] + own.rows)
    names = [field.name for field in fields(own) if field.name != "rows"]
    mixed = {name: torch.lerp(getattr(own, name), getattr(prior, name), weight) for name in names}
    return Moments(own.rows, **mixed)


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
    """Sums of one network's rows, shifted."""

    def __init__(self, rows: Tensor) -> None:
        first = rows[..., :_BLOCK, :].mean(-2, keepdim=True, dtype=torch.float64)
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
        products = [product(a, b) for a, b in pairs]
        if not self._products:
            self._products = products
        else:
            for total, part in zip(self._products, products, strict=True):
                total += part
        self.count += rows.shape[-2]

    def moments(self, rows: int | None = None) -> Moments:
        """The moments of all rows added.

        Args:
            rows: number of rows of which those added are a sample.

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
        second = self._products[which] / self.count
        second.addcmul_(s[..., :, None], means[right][..., None, :])
        second.addcmul_((means[left] - s)[..., :, None], t[..., None, :])
        if left == right:
            second = (second + second.mT) / 2
        return second.cpu()


def one_hot_moments(counts: Tensor) -> Moments:
    """The moments of an embedding's one-hot rows, from how often each index occurred.

    Args:
        counts: (N,) whole numbers, at least one of them above 0.
    """
    rows = int(counts.sum())
    share = counts.double().cpu() / rows
    return Moments(rows, share, share, share, share, share)


@dataclass(frozen=True)
class Positions:
    """Which positions of convolutions are used."""

    most: int | None = None  # an example, on average; None: all
    seed: int = 0

    def of(self, batch: int) -> Sample | None:
        """The sample in batch number ``batch``, the same in every pass."""
        return None if self.most is None else Sample(self.most, derived_seed(self.seed, "positions", batch))


ALL = Positions()


class LayerSums:
    """Accumulates the inputs of one layer over a pass.

    Args:
        layer: whose inputs.
        dense_second: as :class:`Accumulator` takes it.
    """

    def __init__(self, layer: ObservedLayer, dense_second: bool = True) -> None:
        self._layer = layer
        self._accumulator = Accumulator(dense_second)
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


class DensePass:
    """Moments and gradients of the dense network, by weight; none of a weight that the data give no rows.

    ``gradients`` are G, (N_y, N_y) float64 on the CPU: E[g gᵀ] over rows and directions, g the gradient of an
    example's Σ at the layer's output.  An example's change by an error δ there is about rows / examples times
    E[δᵀ G δ], so ``Moments.rows`` times tr[G (W − Ŵ) M (W − Ŵ)ᵀ] can be compared between layers.

    Args:
        scratch: that holds the tensors.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        scratch = scratch or Scratch()
        self.moments = KeptMoments(scratch)
        self.gradients = KeptTensors(scratch)
        self.blocks = KeptTensors(scratch)  # by module Σ g gᵀ over rows and directions, at what blocks give


class KeptTensors(Mapping[str, Tensor]):
    """Tensors in a scratch, each read when it is asked for."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._names = scratch, dict[str, None]()

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor."""
        self._scratch.put((id(self), name), [tensor])
        self._names[name] = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._scratch.get((id(self), name))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class KeptMoments(Mapping[str, Moments]):
    """Moments of the dense network in a scratch; weights that take the same rows share them."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._known: dict[str, tuple[str, int]] = {}  # weight → the first of its rows, and how many there are

    def put(self, names: Sequence[str], moments: Moments) -> None:
        """Keep the moments of these weights."""
        parts = [moments.mean] if moments.second is moments.mean else [moments.mean, moments.second]
        self._scratch.put((id(self), names[0]), parts)
        self._known |= dict.fromkeys(names, (names[0], moments.rows))

    def __getitem__(self, name: str) -> Moments:
        first, rows = self._known[name]
        mean, *seconds = self._scratch.get((id(self), first))
        second = seconds[0] if seconds else mean
        return Moments(rows, mean, second, mean, second, second)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def total_rows(layer: ObservedLayer, output: Tensor, mask: Tensor | None) -> int:
    """The number of rows in a layer's output."""
    return len(layer.inputs.outputs(output.detach(), mask))


def as_rows(layer: ObservedLayer, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient at the layer's output as rows (rows, N_y), float32 or float64."""
    rows = layer.inputs.outputs(gradient, mask)
    return rows if rows.dtype == torch.float64 else rows.float()
