"""Embeddings that gather rows through the cores and never build the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn

from mpoc.nn.contract import is_traced, merge_cores, planned_batch, sites_of
from mpoc.nn.cost import CPU, GPU, Rates, Site, bandwidth, merged
from mpoc.nn.weight import CoreWeight, without_autocast
from mpoc.tensor_networks.forms.contraction import traced_once
from mpoc.tensor_networks.forms.stored import as_chain, split

_AT_ONCE = 1 << 18  # numbers of core slices gathered at a time


class MPOEmbedding(CoreWeight, nn.Embedding):
    """Row v of Ŵ for every index v: with v = (j_1 … j_n) in mixed radix, the product of core slices.

        row[i_1 … i_n] = w⁽¹⁾[j_1, i_1] w⁽²⁾[j_2, i_2] … w⁽ⁿ⁾[j_n, i_n]

    Neighbouring cores may be multiplied together first: then fewer and larger slices are gathered.  For very
    many indices all are, which makes the table for the time of the call.

    Shapes: (…) of whole numbers → (…, embedding_dim).  The ``padding_idx`` row gets no gradient, as in
    ``nn.Embedding``; but it is made from cores that other rows share, so it is as exact as they are, and
    moves when they are trained.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table.

        Raises:
            IndexError: an index is negative or not below ``num_embeddings``. Looked for on the CPU only, and
                neither in a compiled graph nor under vmap: there such an index gives a wrong row.
            RuntimeError: indices are not int32 or int64.
        """
        if self._dense is not None and not self.training:
            return nn.functional.embedding(input, self._dense, self.padding_idx)
        self._check(input)
        with without_autocast(input.device):  # nn.Embedding keeps its dtype
            rows = self._rows(input.reshape(-1))
        return rows.reshape(*input.shape, self.embedding_dim)

    def _check(self, indices: Tensor) -> None:
        if indices.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"indices of an embedding are int32 or int64, not {indices.dtype}")
        # Nothing can be read off indices on a GPU without waiting for it, in a graph, or under vmap.
        unread = is_traced() or indices.device.type != "cpu" or torch._C._functorch.is_batchedtensor(indices)
        if unread or not indices.numel():
            return
        least, largest = indices.aminmax()
        if int(least) < 0 or int(largest) >= self.num_embeddings:
            raise IndexError(f"indices {int(least)}..{int(largest)} for {self.num_embeddings} embeddings")

    def _rows(self, indices: Tensor) -> Tensor:
        """(count,) → (count, embedding_dim)."""
        cores, added = split(list(self.cores), self.structure)
        rows = self._rows_of(indices, as_chain(cores, self.structure))
        if added:
            rows = rows + self._rows_of(indices, added)
        if self.padding_idx is not None:
            rows = torch.where((indices == self.padding_idx)[:, None], rows.detach(), rows)
        return rows

    def _rows_of(self, indices: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """Of one chain."""
        cuts = _best_cuts(sites_of(cores), planned_batch(indices), indices.is_cuda)
        groups = [merge_cores(cores[first:last]) for first, last in pairwise(cuts)]
        at_once = max(1, _AT_ONCE // max([core.numel() // core.shape[1] for core in groups]))
        if is_traced() or indices.shape[0] <= at_once:
            rows = _gather(indices, groups)
        else:
            rows = torch.cat([_gather(part, groups) for part in indices.split(at_once)])
        return rows[:, : self.embedding_dim]


def _gather(indices: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The equation: (count,) → (count, ΠI)."""
    rows = cores[0].new_ones(1, 1, 1)  # (count, I so far, D)
    after = math.prod([core.shape[1] for core in cores])
    for core in cores:
        after //= core.shape[1]
        if core.shape[1] == 1:  # the same for every row
            rows = (rows @ core[:, 0].flatten(1)).unflatten(2, core.shape[2:]).flatten(1, 2)
            continue
        digit = indices // after % core.shape[1]
        sliced = core.transpose(0, 1)[digit]  # (count, D_left, I, D_right)
        rows = (rows @ sliced.flatten(2)).unflatten(2, sliced.shape[2:]).flatten(1, 2)
    return rows.flatten(1)


@cache
def _cheapest(sites: tuple[Site, ...], count: int, on_gpu: bool) -> tuple[int, ...]:
    """Of all groupings of ``sites`` the one that takes least time for ``count`` rows."""
    inner, rates = range(1, len(sites)), GPU if on_gpu else CPU
    every = [(0, *c, len(sites)) for size in range(len(sites)) for c in combinations(inner, size)]
    return min(every, key=lambda cuts: _seconds(sites, cuts, count, rates))


def _seconds(sites: tuple[Site, ...], cuts: tuple[int, ...], count: int, rates: Rates) -> float:
    """Estimated time: merging, then for each group gathering slices (written and read) and multiplying."""
    groups, total = merged(sites, cuts, rates)
    total, before = 3 * total, 1  # merged cores are fresh memory; before: I so far
    for a, _, i, b in groups:
        flops, numbers = 2 * count * before * a * i * b, count * (3 * a * i * b + before * (a + i * b))
        total += 1.5 * rates.start + flops / (rates.flops / 4) + 4 * numbers / bandwidth(numbers, rates)
        before *= i
    return total


_best_cuts = traced_once(_cheapest)
