"""Embeddings that gather rows through the cores and never build the table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpoc.nn.weight import CoreWeight
from mpoc.tensor_networks.forms.contraction import is_traced, without_autocast


class MPOEmbedding(CoreWeight, nn.Embedding):
    """Row v of Ŵ for every index v.

    Shapes: (…) of int32 or int64 → (…, embedding_dim). The ``padding_idx`` row gets no gradient, as in
    ``nn.Embedding``. But it is made from cores that other rows share, so it has an error as they do, and it
    changes when they are trained.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, (…) → (…, embedding_dim).

        Raises:
            IndexError: an index is negative or not below ``num_embeddings``. This is checked on the CPU only,
                and neither in a compiled graph nor under vmap: there such an index gives a wrong row.
            RuntimeError: the indices are not int32 or int64.
        """
        held = self.held_weight()
        if held is not None:
            return nn.functional.embedding(input, held, self.padding_idx)
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
        rows = self.form.rows(indices)
        if self.order is not None:  # taken for a linear layer when its inputs were put in order
            rows = rows[:, self.order.argsort().to(rows.device)]
        if self.padding_idx is not None:
            rows = torch.where((indices == self.padding_idx)[:, None], rows.detach(), rows)
        return rows
