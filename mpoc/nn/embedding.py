"""Embeddings that gather rows through the cores and never build the table."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn

from mpoc.nn.contract import Site, merge, planned_batch
from mpoc.nn.weight import CoreWeight, without_autocast

_FLOPS_PER_NUMBER = 50  # arithmetic that takes as long as writing a number to memory


class MPOEmbedding(CoreWeight, nn.Embedding):
    """Row v of Ŵ for every index v: with v = (j_1 … j_n) in mixed radix, the product of core slices.

        row[i_1 … i_n] = w⁽¹⁾[j_1, i_1] w⁽²⁾[j_2, i_2] … w⁽ⁿ⁾[j_n, i_n]

    Neighbouring cores may be multiplied together first: then fewer and larger slices are gathered.  For very
    many indices all are, which makes the table for the time of the call.

    Shapes: (…) of whole numbers → (…, embedding_dim).  ``padding_idx`` rows get no gradient, as in
    ``nn.Embedding``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table.

        Raises:
            IndexError: an index is negative or not below ``num_embeddings`` (on the CPU, uncompiled).
        """
        if self._dense is not None and not self.training:
            return nn.functional.embedding(input, self._dense, self.padding_idx)
        self._check(input)
        with without_autocast(input.device):  # nn.Embedding keeps its dtype
            rows = self._rows(input.reshape(-1))
        return rows.reshape(*input.shape, self.embedding_dim)

    def _check(self, indices: Tensor) -> None:
        if torch.compiler.is_compiling() or indices.device.type != "cpu" or not indices.numel():
            return
        least, largest = indices.aminmax()
        if int(least) < 0 or int(largest) >= self.num_embeddings:
            raise IndexError(f"indices {int(least)}..{int(largest)} for {self.num_embeddings} embeddings")

    def _rows(self, indices: Tensor) -> Tensor:
        """(count,) → (count, embedding_dim)."""
        cores = list(self.cores)
        cuts = _best_cuts(tuple([tuple(core.shape) for core in cores]), planned_batch(indices))
        rows = cores[0].new_ones(1, 1, 1)  # (count, I so far, D)
        after = math.prod(self.structure.output_factors)
        for first, last in pairwise(cuts):
            core = merge(cores[first:last])
            after //= core.shape[1]
            digit = indices // after % core.shape[1]
            sliced = core.transpose(0, 1)[digit]  # (count, D_left, I, D_right)
            rows = (rows @ sliced.flatten(2)).unflatten(2, sliced.shape[2:]).flatten(1, 2)
        rows = rows.flatten(1)[:, : self.embedding_dim]
        if self.padding_idx is not None:
            rows = torch.where((indices == self.padding_idx)[:, None], rows.detach(), rows)
        return rows


def _best_cuts(sites: tuple[Site, ...], count: int) -> tuple[int, ...]:
    return _cheapest(sites, count)


_best_cuts._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in mpoc.nn.contract


@cache
def _cheapest(sites: tuple[Site, ...], count: int) -> tuple[int, ...]:
    """Of all groupings of ``sites`` the one that writes the fewest numbers for ``count`` rows."""
    inner = range(1, len(sites))
    every = [(0, *c, len(sites)) for size in range(len(sites)) for c in combinations(inner, size)]
    return min(every, key=lambda cuts: _written(sites, cuts, count))


def _written(sites: tuple[Site, ...], cuts: tuple[int, ...], count: int) -> float:
    """Numbers written to memory, arithmetic counted by the numbers that could be written meanwhile."""
    total, before = 0.0, 1  # before: I so far
    for first, last in pairwise(cuts):
        a, j, i, b = sites[first]
        for c, more_j, more_i, d in sites[first + 1 : last]:
            j, i, b = j * more_j, i * more_i, d
            total += a * j * i * b * (2 + 2 * c / _FLOPS_PER_NUMBER)
        total += count * a * i * b * (3 + 2 * before / _FLOPS_PER_NUMBER)  # gathered, read again, multiplied
        before *= i
        total += count * before * b
    return total
