"""Which examples each step takes: a pure function of seed and step, so that a resume needs no sampler state.

The examples of a step are the same for any number of processes and of parts: they are cut into contiguous
shares, one a process, and each share into parts.  Texts of about one length go together, so that little is
padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoc.data import Examples, shuffled
from mpoc.data.stream import TokenStream
from mpoc.train.settings import derived_seed

_WINDOW = 16  # batches among which lengths are sorted


class Order:
    """The shuffled order of a training split.

    Args:
        examples: of the split.
        batch: examples a step, over all processes.
        parts: in which a process computes its share, for gradient accumulation.
        rank: of this process.
        processes: in all.
        seed: of the shuffle.
    """

    def __init__(
        self, examples: Examples, batch: int, parts: int = 1, rank: int = 0, processes: int = 1, seed: int = 0
    ) -> None:
        self.examples = examples
        self.batch = min(batch, len(examples))
        self.parts, self.rank, self.processes, self.seed = parts, rank, processes, seed
        # The last, smaller batch of an epoch is taken where every part gets as much as batch norm needs.
        whole, rest = divmod(len(examples), self.batch)
        least = min(2, self.batch // (parts * processes))
        self.steps_per_epoch = whole + int(rest // (parts * processes) >= max(1, least))
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def steps(self, epochs: float) -> int:
        """How many steps ``epochs`` passes are; a begun step is taken."""
        return math.ceil(epochs * self.steps_per_epoch)

    def indices(self, step: int) -> list[Tensor]:
        """The examples of this process in step ``step`` (from 0), one (n,) int64 for each part."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._begin_epoch(epoch)
            order, lengths = shuffled(self.examples, generator), self.examples.lengths()
            if lengths is not None:
                order = by_length(order, lengths, self.batch, generator)
            self._epoch, self._permutation = epoch, order
        chosen = self._permutation[k * self.batch : (k + 1) * self.batch]
        share = cut(chosen, self.rank, self.processes)
        return [cut(share, part, self.parts) for part in range(self.parts)]

    def _begin_epoch(self, epoch: int) -> None:
        """Examples that are drawn anew each epoch (windows of a text) are so now."""
        if isinstance(self.examples, TokenStream):
            self.examples.set_epoch(epoch)


def by_length(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Within each window of ``order``, examples of about one length in a batch, batches in random order.

    Args:
        order: (n,) examples.
        lengths: by example.
        batch: examples of a batch; what is left over at the end stays there.
        generator: draws the order of the batches.
    """
    found = []
    for window in order.split(_WINDOW * batch):
        count = len(window) // batch
        whole, rest = window[: count * batch], window[count * batch :]
        alike = whole[lengths[whole].argsort(stable=True)].view(count, batch)
        found += [alike[torch.randperm(count, generator=generator)].flatten(), rest]
    return torch.cat(found)


def cut(indices: Tensor, k: int, pieces: int) -> Tensor:
    """Piece ``k`` of ``pieces`` contiguous ones, as equal as can be."""
    if pieces == 1:
        return indices
    count = len(indices)
    return indices[k * count // pieces : (k + 1) * count // pieces]
